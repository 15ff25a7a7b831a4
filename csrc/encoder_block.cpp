#include "encoder_block.h"

#include <algorithm>
#include <string>

#include "thread_pool.h"

namespace i2f {
namespace {

constexpr std::int64_t kRows = 192;   // of an item, at most: some hundred KB, and weights are read once an item
constexpr std::int64_t kTiles = 24;   // rows that fill register tiles
constexpr std::int64_t kUnits = 256;  // hidden units whose weights are used together, once an item
constexpr std::int64_t kChain = 128;  // of LinearWeights

thread_local Arena arena;

// Call body(first row, rows, scratch) for all rows, on all threads.
template <class Body>
void for_rows(std::int64_t rows, std::int64_t floats, const Body& body) {
    if (rows == 0) return;
    const int workers = threads();
    const std::int64_t items = workers * blocks_of(rows, workers * kRows);  // as many for every thread
    const std::int64_t step = round_to(blocks_of(rows, items), kTiles);
    const std::int64_t scratch = round_to(floats, 16);
    auto* const memory = reinterpret_cast<float*>(arena.get(static_cast<std::size_t>(workers * scratch) * sizeof(float)));
    for_items(
        blocks_of(rows, step), workers,
        [&](std::int64_t item, int worker) {
            const std::int64_t first = item * step;
            body(first, std::min(step, rows - first), memory + worker * scratch);
        },
        Lane::image);
}

}  // namespace

EncoderBlock::EncoderBlock(std::int64_t width, std::int64_t hidden, const GetWeight& get, const Kernels& kernels)
    : kernels_(kernels), width_(width) {
    const std::int64_t C = width_;
    const auto vector = [&](const char* name) { return store_.copy(get(name, {C}), C, kernels.panel); };
    norm1_weight_ = vector("norm1.weight");
    norm1_bias_ = vector("norm1.bias");
    norm2_weight_ = vector("norm2.weight");
    norm2_bias_ = vector("norm2.bias");

    // A layer's outputs first_output ... of the terms first_term ...; the bias goes with the first terms.
    struct Layer {
        const float *weight, *bias;
        std::int64_t terms;
    };
    const auto layer = [&](const char* name, std::int64_t outputs, std::int64_t terms) {
        const std::string of = name;
        return Layer{get(of + ".weight", {outputs, terms}), get(of + ".bias", {outputs}), terms};
    };
    const auto part = [&](const Layer& from, std::int64_t first_output, std::int64_t outputs, std::int64_t first_term,
                          std::int64_t terms) {
        LinearWeights weights = store_.linear(
            terms, outputs, kernels,
            [=](std::int64_t j, std::int64_t k) { return from.weight[(first_output + j) * from.terms + first_term + k]; },
            [=](std::int64_t j) { return first_term == 0 ? from.bias[first_output + j] : 0.0F; });
        weights.chain = kChain;
        return weights;
    };
    qkv_ = part(layer("attn.qkv", 3 * C, C), 0, 3 * C, 0, C);
    proj_ = part(layer("attn.proj", C, C), 0, C, 0, C);
    const Layer in = layer("fc1", hidden, C);
    const Layer out = layer("fc2", C, hidden);
    for (std::int64_t unit = 0; unit < hidden; unit += kUnits) {
        const std::int64_t units = std::min(kUnits, hidden - unit);
        parts_.push_back({part(in, unit, units, 0, C), part(out, 0, C, unit, units)});
    }
}

void EncoderBlock::project(const float* x, std::int64_t rows, float* qkv) const {
    const std::int64_t C = width_;
    const std::int64_t padded = round_to(C, kernels_.panel);
    for_rows(rows, kRows * padded, [&](std::int64_t first, std::int64_t count, float* normed) {
        for (std::int64_t i = 0; i < count; ++i) std::copy_n(x + (first + i) * C, C, normed + i * padded);
        kernels_.norm(normed, padded, count, C, norm1_weight_, norm1_bias_);
        kernels_.linear(qkv_, normed, padded, count, Finish::plain, qkv + first * 3 * C, 3 * C);
    });
}

void EncoderBlock::finish(float* x, const float* attended, std::int64_t rows) const {
    const std::int64_t C = width_;
    const std::int64_t padded = round_to(C, kernels_.panel);
    for_rows(rows, kRows * (padded + kUnits), [&](std::int64_t first, std::int64_t count, float* normed) {
        float* const hidden = normed + kRows * padded;
        float* const out = x + first * C;
        kernels_.linear(proj_, attended + first * C, C, count, Finish::add, out, C);
        for (std::int64_t i = 0; i < count; ++i) std::copy_n(out + i * C, C, normed + i * padded);
        kernels_.norm(normed, padded, count, C, norm2_weight_, norm2_bias_);
        for (const Part& part : parts_) {
            kernels_.linear(part.in, normed, padded, count, Finish::gelu, hidden, kUnits);
            kernels_.linear(part.out, hidden, kUnits, count, Finish::add, out, C);
        }
    });
}

}  // namespace i2f
