#include "window_attention.h"

#include <algorithm>
#include <cmath>

#include "thread_pool.h"

namespace i2f {
namespace {

thread_local Arena arena;

// (a, b) -> (a cos + b sin, b cos - a sin) of adjacent channels; the first of all pairs, then the second: the order of
// channels is the same for queries and keys, which is all that their products ask.
void turn(const float* from, const float* cosines, const float* sines, std::int64_t half, float scale, float* to) {
    for (std::int64_t j = 0; j < half; ++j) {
        const float a = from[2 * j];
        const float b = from[2 * j + 1];
        to[j] = (a * cosines[j] + b * sines[j]) * scale;
        to[half + j] = (b * cosines[j] - a * sines[j]) * scale;
    }
}

}  // namespace

WindowAttention::WindowAttention(std::int64_t side, std::int64_t heads, std::int64_t a, const float* cosines,
                                 const float* sines, const Kernels& kernels)
    : kernels_(kernels),
      side_(side),
      heads_(heads),
      a_(a),
      cosines_(store_.copy(cosines, side * side * a / 2, 1)),
      sines_(store_.copy(sines, side * side * a / 2, 1)) {}

void WindowAttention::window(const WindowCall& call, std::int64_t top, std::int64_t left, std::int64_t head,
                             float* scratch) const {
    const std::int64_t P = kernels_.panel;
    const std::int64_t places = side_ * side_;
    const std::int64_t half = a_ / 2;
    const std::int64_t padded = round_to(a_, P);
    const std::int64_t width = heads_ * a_;
    const bool pairs = kernels_.pairs;
    float* const k = scratch;
    float* const v = k + round_to(places, P) * a_;
    float* const queries = v + round_to(places, 2) * padded;
    float* const result = queries + kQueryRows * padded;
    float* const space = result + kQueryRows * padded;

    const auto token_at = [&](std::int64_t place) {  // -1: outside
        const std::int64_t y = top + place / side_;
        const std::int64_t x = left + place % side_;
        return y < 0 || y >= call.height || x < 0 || x >= call.width ? std::int64_t{-1} : y * call.width + x;
    };
    for (std::int64_t t = 0; t < places; ++t) {
        const std::int64_t token = token_at(t);
        const float* from = (token < 0 ? call.padding : call.qkv + token * 3 * width) + width + head * a_;
        float* const turned = queries;  // free until the keys are known
        turn(from, cosines_ + t * half, sines_ + t * half, half, 1.0F, turned);
        float* key = k + t / P * P * words_of(a_, pairs) + t % P;
        for (std::int64_t j = 0; j < a_; ++j) put(key, P, j, turned[j], pairs);
        const float* value = from + width;
        for (std::int64_t c = 0; c < a_; c += P) {
            const std::int64_t some = std::min(P, a_ - c);
            float* to = v + c * words_of(places, pairs);
            if (pairs) {
                for (std::int64_t j = 0; j < some; ++j) put_half(to + t / 2 * P + j, P, t % 2, value[c + j]);
            } else {
                std::copy_n(value + c, some, to + t * P);
            }
        }
    }

    const KeyValues keys{a_, places, k, v};
    const float scale = 1.0F / std::sqrt(static_cast<float>(a_));
    const auto stride = static_cast<std::ptrdiff_t>(padded);
    std::int64_t tokens[kQueryRows];
    std::int64_t count = 0;
    for (std::int64_t t = 0; t < places; ++t) {
        const std::int64_t token = token_at(t);
        if (token >= 0) {
            const float* from = call.qkv + token * 3 * width + head * a_;
            turn(from, cosines_ + t * half, sines_ + t * half, half, scale, queries + count * padded);
            tokens[count++] = token;
        }
        if (count == kQueryRows || (t + 1 == places && count > 0)) {
            kernels_.attend(keys, queries, stride, count, result, stride, space);
            for (std::int64_t i = 0; i < count; ++i) {
                std::copy_n(result + i * padded, a_, call.out + tokens[i] * width + head * a_);
            }
            count = 0;
        }
    }
}

void WindowAttention::run(const WindowCall& call) const {
    const std::int64_t P = kernels_.panel;
    const std::int64_t places = side_ * side_;
    const std::int64_t padded = round_to(a_, P);
    const std::int64_t down = blocks_of(call.height + call.lead, side_);
    const std::int64_t across = blocks_of(call.width + call.lead, side_);
    const std::int64_t keys = round_to(places, P) * a_ + round_to(places, 2) * padded;
    const std::int64_t scratch = round_to(keys + 2 * kQueryRows * padded + attend_floats(a_, P), 16);
    const int workers = threads();
    auto* const memory = reinterpret_cast<float*>(arena.get(static_cast<std::size_t>(workers * scratch) * sizeof(float)));
    // Words and columns that no place fills are multiplied with.
    for (int worker = 0; worker < workers; ++worker) std::fill_n(memory + worker * scratch, keys, 0.0F);
    for_items(
        down * across * heads_, workers,
        [&](std::int64_t item, int worker) {
            const std::int64_t index = item / heads_;
            window(call, index / across * side_ - call.lead, index % across * side_ - call.lead, item % heads_,
                   memory + worker * scratch);
        },
        Lane::image);
}

}  // namespace i2f
