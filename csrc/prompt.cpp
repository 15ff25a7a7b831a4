#include "prompt.h"

#include <algorithm>
#include <vector>

#include "thread_pool.h"

namespace i2f {
namespace {

constexpr std::int64_t kToken = 16;
constexpr std::int32_t kStates = 5;
enum Kind : std::int32_t { kInterior, kTop, kLeft, kCorner, kKinds };
// A position's vector: first the table, by kind and state, then zeros for what lies outside, then computed ones.
constexpr std::int32_t kOutside = kKinds * kStates;
constexpr std::int32_t kSlots = kOutside + 1;
constexpr std::int32_t kNotYet = -1;
constexpr std::int64_t kBlock = 48;

std::int32_t kind_of(std::int64_t row, std::int64_t column) { return (row == 0 ? kTop : 0) + (column == 0 ? kLeft : 0); }

struct Level {
    std::int64_t rows, columns;
    std::int32_t* slots;              // [rows, columns]
    std::vector<std::int32_t> mixed;  // positions that are computed, in the order of their slots
    float* values;                    // [mixed, width]
};

// Grow-only working memory of a thread.
struct Space {
    Arena slots, values, columns;
    Level levels[5];
};
thread_local Space space;

template <class T>
T* take(std::byte*& memory, std::int64_t count) {
    auto* piece = reinterpret_cast<T*>(memory);
    memory += round_up(static_cast<std::size_t>(count) * sizeof(T), kAlignment);
    return piece;
}

}  // namespace

Prompt::Prompt(const GetWeight& get, const std::int64_t (&widths)[5], const Kernels& kernels) : kernels_(kernels) {
    std::copy(std::begin(widths), std::end(widths), std::begin(widths_));
    const float* labels = get("labels.weight", {kStates, kStates});
    const float* weight = get("convs.0.weight", {widths[1], kStates, 3, 3});
    float* first = store_.take(9 * kStates * widths[1]);
    for (std::int64_t tap = 0; tap < 9; ++tap) {
        for (std::int64_t state = 0; state < kStates; ++state) {
            for (std::int64_t c = 0; c < widths[1]; ++c) {
                float sum = 0.0F;
                for (std::int64_t e = 0; e < kStates; ++e) {
                    sum += weight[(c * kStates + e) * 9 + tap] * labels[state * kStates + e];
                }
                first[(tap * kStates + state) * widths[1] + c] = sum;
            }
        }
    }
    first_ = first;
    first_bias_ = store_.copy(get("convs.0.bias", {widths[1]}), widths[1], 1);
    for (int level = 2; level <= 4; ++level) {
        const std::string name = "convs." + std::to_string(level - 1);
        const std::int64_t in = widths[level - 1];
        const float* w = get(name + ".weight", {widths[level], in, 3, 3});
        const float* b = get(name + ".bias", {widths[level]});
        layers_[level] = store_.linear(
            9 * in, widths[level], kernels,
            [&](std::int64_t j, std::int64_t k) { return w[(j * in + k % in) * 9 + k / in]; },
            [&](std::int64_t j) { return b[j]; });
    }
    std::vector<float> gathered;
    for (int level = 1; level <= 4; ++level) {
        const std::int64_t width = widths[level];
        float* table = store_.take(kSlots * width);
        for (std::int32_t kind = 0; kind < kKinds; ++kind) {
            for (std::int32_t state = 0; state < kStates; ++state) {
                float* out = table + (kind * kStates + state) * width;
                const bool no_above = (kind & kTop) != 0;
                const bool no_left = (kind & kLeft) != 0;
                gathered.clear();
                for (int tap = 0; tap < 9; ++tap) {
                    const int dy = tap / 3;
                    const int dx = tap % 3;
                    const bool outside = (no_above && dy == 0) || (no_left && dx == 0);
                    if (level == 1) {
                        if (outside) continue;
                        const float* part = first + (tap * kStates + state) * width;
                        for (std::int64_t c = 0; c < width; ++c) out[c] += part[c];
                        continue;
                    }
                    const std::int32_t from = (no_above && dy == 1 ? kTop : 0) + (no_left && dx == 1 ? kLeft : 0);
                    const std::int32_t slot = outside ? kOutside : from * kStates + state;
                    const float* vector = tables_[level - 1] + slot * widths[level - 1];
                    gathered.insert(gathered.end(), vector, vector + widths[level - 1]);
                }
                if (level == 1) {
                    for (std::int64_t c = 0; c < width; ++c) out[c] = std::max(out[c] + first_bias_[c], 0.0F);
                } else {
                    const auto terms = static_cast<std::ptrdiff_t>(gathered.size());
                    kernels.linear(layers_[level], gathered.data(), terms, 1, Finish::relu, out, width);
                }
            }
        }
        tables_[level] = table;
    }
}

void Prompt::add(const std::uint8_t* state, std::ptrdiff_t row_stride, std::int64_t height, std::int64_t width,
                 const Box& box, const float* tokens, float* x) const {
    const std::int64_t rows = (box.bottom - box.top) / kToken;
    const std::int64_t columns = (box.right - box.left) / kToken;
    const std::uint8_t* crop = state + box.top * row_stride + box.left;
    const std::int64_t crop_width = box.right - box.left;

    std::int64_t places = 0;
    for (int level = 1; level <= 4; ++level) places += (rows << (4 - level)) * (columns << (4 - level));
    auto* slots = reinterpret_cast<std::int32_t*>(space.slots.get(static_cast<std::size_t>(places) * sizeof(std::int32_t)));
    std::fill_n(slots, places, kNotYet);
    for (int level = 1; level <= 4; ++level) {
        Level& l = space.levels[level];
        l.rows = rows << (4 - level);
        l.columns = columns << (4 - level);
        l.slots = slots;
        l.mixed.clear();
        slots += l.rows * l.columns;
    }

    // Tokens whose whole field holds one state. Pixels 16 i - 15 .. 16 i + 15, clipped to the crop.
    auto* low = reinterpret_cast<std::uint8_t*>(space.columns.get(2 * round_up(static_cast<std::size_t>(crop_width), 64)));
    std::uint8_t* high = low + round_up(static_cast<std::size_t>(crop_width), 64);
    Level& top_level = space.levels[4];
    std::vector<std::int32_t>& mixed_tokens = top_level.mixed;
    for (std::int64_t i = 0; i < rows; ++i) {
        std::fill_n(low, crop_width, std::uint8_t{255});
        std::fill_n(high, crop_width, std::uint8_t{0});
        for (std::int64_t y = std::max<std::int64_t>(kToken * i - 15, 0); y < kToken * (i + 1); ++y) {
            kernels_.min_max(crop + y * row_stride, crop_width, low, high);
        }
        std::uint8_t last_low = 255;  // of the token before: its pixels 1 .. 15 belong to this field too
        std::uint8_t last_high = 0;
        for (std::int64_t j = 0; j < columns; ++j) {
            const std::uint8_t* from_low = low + kToken * j;
            const std::uint8_t* from_high = high + kToken * j;
            std::uint8_t tail_low = from_low[1];
            std::uint8_t tail_high = from_high[1];
            for (int p = 2; p < kToken; ++p) {
                tail_low = std::min(tail_low, from_low[p]);
                tail_high = std::max(tail_high, from_high[p]);
            }
            const std::uint8_t least = std::min({from_low[0], tail_low, last_low});
            const std::uint8_t most = std::max({from_high[0], tail_high, last_high});
            last_low = tail_low;
            last_high = tail_high;
            std::int32_t& slot = top_level.slots[i * columns + j];
            if (least == most) {
                slot = kind_of(i, j) * kStates + least;
            } else {
                slot = kSlots + static_cast<std::int32_t>(mixed_tokens.size());
                mixed_tokens.push_back(static_cast<std::int32_t>(i * columns + j));
            }
        }
    }

    // The positions below mixed tokens, finest first: constant, or to be computed.
    for (int level = 1; level <= 3; ++level) {
        Level& l = space.levels[level];
        const Level& below = space.levels[level - 1];
        const std::int64_t scale = std::int64_t{1} << (4 - level);
        for (const std::int32_t token : mixed_tokens) {
            const std::int64_t i0 = token / columns * scale;
            const std::int64_t j0 = token % columns * scale;
            for (std::int64_t i = std::max<std::int64_t>(i0 - scale + 1, 0); i < i0 + scale; ++i) {
                for (std::int64_t j = std::max<std::int64_t>(j0 - scale + 1, 0); j < j0 + scale; ++j) {
                    std::int32_t& slot = l.slots[i * l.columns + j];
                    if (slot != kNotYet) continue;
                    const std::int64_t y0 = std::max<std::int64_t>(2 * i - 1, 0);
                    const std::int64_t x0 = std::max<std::int64_t>(2 * j - 1, 0);
                    std::int32_t found = -1;
                    bool same = true;
                    for (std::int64_t y = y0; same && y <= 2 * i + 1; ++y) {
                        for (std::int64_t p = x0; p <= 2 * j + 1; ++p) {
                            std::int32_t here;
                            if (level == 1) {
                                here = crop[y * row_stride + p];
                            } else {
                                const std::int32_t from = below.slots[y * below.columns + p];
                                here = from < kOutside ? from % kStates : kStates;  // kStates: not constant
                            }
                            if (found < 0) found = here;
                            same = same && here == found && here < kStates;
                        }
                    }
                    if (same) {
                        slot = kind_of(i, j) * kStates + found;
                    } else {
                        slot = kSlots + static_cast<std::int32_t>(l.mixed.size());
                        l.mixed.push_back(static_cast<std::int32_t>(i * l.columns + j));
                    }
                }
            }
        }
    }

    // Values, layer by layer. Scratch of a worker: the gathered inputs of a block.
    std::int64_t floats = 0;
    for (int level = 1; level <= 4; ++level) {
        floats += round_to(static_cast<std::int64_t>(space.levels[level].mixed.size()) * widths_[level], 16) + 64;
    }
    const std::int64_t deepest = 9 * std::max({widths_[1], widths_[2], widths_[3]});
    const int workers = threads();
    std::byte* memory = space.values.get(static_cast<std::size_t>(floats + workers * kBlock * deepest + 64) * sizeof(float));
    for (int level = 1; level <= 4; ++level) {
        Level& l = space.levels[level];
        l.values = take<float>(memory, static_cast<std::int64_t>(l.mixed.size()) * widths_[level]);
    }
    float* scratch = take<float>(memory, workers * kBlock * deepest);
    const Level* levels = space.levels;  // thread_local: workers must not name it
    for (int level = 1; level <= 4; ++level) {
        const Level& l = levels[level];
        const auto count = static_cast<std::int64_t>(l.mixed.size());
        const std::int64_t out_width = widths_[level];
        for_items(blocks_of(count, kBlock), workers, [&](std::int64_t item, int worker) {
            const std::int64_t first = item * kBlock;
            const std::int64_t n = std::min(kBlock, count - first);
            if (level == 1) {
                for (std::int64_t r = first; r < first + n; ++r) {
                    const std::int64_t i = l.mixed[static_cast<std::size_t>(r)] / l.columns;
                    const std::int64_t j = l.mixed[static_cast<std::size_t>(r)] % l.columns;
                    float* out = l.values + r * out_width;
                    std::fill_n(out, out_width, 0.0F);
                    for (int tap = 0; tap < 9; ++tap) {
                        const std::int64_t y = 2 * i + tap / 3 - 1;
                        const std::int64_t p = 2 * j + tap % 3 - 1;
                        if (y < 0 || p < 0) continue;
                        const float* part = first_ + (tap * kStates + crop[y * row_stride + p]) * out_width;
                        for (std::int64_t c = 0; c < out_width; ++c) out[c] += part[c];
                    }
                    for (std::int64_t c = 0; c < out_width; ++c) {
                        const float sum = out[c] + first_bias_[c];
                        out[c] = sum < 0.0F ? 0.0F : sum;
                    }
                }
                return;
            }
            const Level& below = levels[level - 1];
            const std::int64_t in = widths_[level - 1];
            float* rows_in = scratch + worker * kBlock * deepest;
            for (std::int64_t r = 0; r < n; ++r) {
                const std::int64_t i = l.mixed[static_cast<std::size_t>(first + r)] / l.columns;
                const std::int64_t j = l.mixed[static_cast<std::size_t>(first + r)] % l.columns;
                for (int tap = 0; tap < 9; ++tap) {
                    const std::int64_t y = 2 * i + tap / 3 - 1;
                    const std::int64_t p = 2 * j + tap % 3 - 1;
                    const std::int32_t slot = y < 0 || p < 0 ? kOutside : below.slots[y * below.columns + p];
                    const float* vector = slot < kSlots ? tables_[level - 1] + slot * in : below.values + (slot - kSlots) * in;
                    std::copy(vector, vector + in, rows_in + (r * 9 + tap) * in);
                }
            }
            kernels_.linear(layers_[level], rows_in, 9 * in, n, Finish::relu, l.values + first * out_width, out_width);
        });
    }

    const std::int64_t d = widths_[4];
    const std::int64_t tokens_wide = width / kToken;
    const std::int64_t left = box.left / kToken;
    const std::int64_t top = box.top / kToken;
    for_items(height / kToken, workers, [&](std::int64_t row, int) {
        const bool inside_row = row >= top && row < top + rows;
        for (std::int64_t column = 0; column < tokens_wide; ++column) {
            const bool inside = inside_row && column >= left && column < left + columns;
            const std::int32_t slot = inside ? levels[4].slots[(row - top) * columns + column - left]
                                             : kInterior * kStates + 1;  // far from everything: possible background
            const float* vector = slot < kSlots ? tables_[4] + slot * d : levels[4].values + (slot - kSlots) * d;
            const std::int64_t at = (row * tokens_wide + column) * d;
            for (std::int64_t c = 0; c < d; ++c) x[at + c] = tokens[at + c] + vector[c];
        }
    });
}

}  // namespace i2f
