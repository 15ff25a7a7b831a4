#include "upsampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "thread_pool.h"

namespace i2f {
namespace {

constexpr std::int64_t kChannels = 4;           // of an item: 36 rows of taps, whole register tiles
constexpr std::int64_t kStripFloats = 1 << 17;  // of products that a worker holds at a time: half a megabyte
constexpr float kEven[4] = {-0.03515625F, 0.26171875F, 0.87890625F, -0.10546875F};  // as in click_kernels.inc
constexpr float kOdd[4] = {-0.10546875F, 0.87890625F, 0.26171875F, -0.03515625F};

thread_local Arena arena;

// Where the parts of EdgeMaps begin.
struct EdgeLayout {
    std::int64_t out, rows, columns, high_rows, high_columns;  // rows, columns: tokens
    std::int64_t above, below, before, behind, corners, size;

    EdgeLayout(std::int64_t outputs, std::int64_t token_rows, std::int64_t token_columns, int stage)
        : out(outputs), rows(token_rows), columns(token_columns),
          high_rows(token_rows * (std::int64_t{2} << stage)), high_columns(token_columns * (std::int64_t{2} << stage)) {
        above = round_to(out * high_rows * high_columns, kEdgeBlock);
        below = above + round_to(out * rows * high_columns, kEdgeBlock);
        before = below + round_to(out * rows * high_columns, kEdgeBlock);
        behind = before + round_to(out * columns * high_rows, kEdgeBlock);
        corners = behind + round_to(out * columns * high_rows, kEdgeBlock);
        size = corners + round_to(4 * out * rows * columns, kEdgeBlock);
    }
};

// `part` counts what EdgeMaps lists: all, above, below, before, behind, the four corners.
struct Exact {
    const float* maps;

    float at(std::int64_t, std::int64_t i) const { return maps[i]; }
    // row[k] += sign * maps[first + k]
    void add(std::int64_t, std::int64_t first, std::int64_t count, float sign, float* row) const {
        for (std::int64_t k = 0; k < count; ++k) row[k] += sign * maps[first + k];
    }
};

struct Packed {
    const std::int16_t* maps;
    const std::uint16_t* units;
    const float* middles;  // of this channel
    std::int64_t out;

    float unit(std::int64_t block) const {
        const std::uint32_t bits = static_cast<std::uint32_t>(units[block]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
    }
    float at(std::int64_t part, std::int64_t i) const {
        return middles[part * out] + unit(i / kEdgeBlock) * static_cast<float>(maps[i]);
    }
    void add(std::int64_t part, std::int64_t first, std::int64_t count, float sign, float* row) const {
        const float middle = sign * middles[part * out];
        for (std::int64_t k = 0; k < count;) {
            const std::int64_t block = (first + k) / kEdgeBlock;
            const std::int64_t end = std::min(count, (block + 1) * kEdgeBlock - first);
            const float by = sign * unit(block);
            for (; k < end; ++k) row[k] += middle + by * static_cast<float>(maps[first + k]);
        }
    }
};

// Row y of the crop's conv(E) + bias for channel c.
template <class Maps>
void edge_row(const EdgeLayout& at, const Maps& maps, float bias, std::int64_t c, const TokenBox& box,
              std::int64_t pixels, std::int64_t y, float* row) {
    const std::int64_t width = (box.right - box.left) * pixels;
    const std::int64_t height = (box.bottom - box.top) * pixels;
    const std::int64_t full_y = box.top * pixels + y;
    const std::int64_t x0 = box.left * pixels;
    std::fill_n(row, width, bias);
    maps.add(0, (c * at.high_rows + full_y) * at.high_columns + x0, width, 1.0F, row);
    const bool first = y == 0;
    const bool last = y == height - 1;
    if (first) maps.add(1, at.above + (c * at.rows + box.top) * at.high_columns + x0, width, -1.0F, row);
    if (last) maps.add(2, at.below + (c * at.rows + box.bottom - 1) * at.high_columns + x0, width, -1.0F, row);
    row[0] -= maps.at(3, at.before + (c * at.columns + box.left) * at.high_rows + full_y);
    row[width - 1] -= maps.at(4, at.behind + (c * at.columns + box.right - 1) * at.high_rows + full_y);
    const auto corner = [&](std::int64_t index, std::int64_t token_row, std::int64_t token_column) {
        return maps.at(5 + index, at.corners + ((index * at.out + c) * at.rows + token_row) * at.columns + token_column);
    };
    if (first) {  // taken off twice above
        row[0] += corner(0, box.top, box.left);
        row[width - 1] += corner(1, box.top, box.right - 1);
    }
    if (last) {
        row[0] += corner(2, box.bottom - 1, box.left);
        row[width - 1] += corner(3, box.bottom - 1, box.right - 1);
    }
}

}  // namespace

std::int64_t edge_map_size(std::int64_t out, std::int64_t rows, std::int64_t columns, int stage) {
    return EdgeLayout(out, rows, columns, stage).size;
}

Upsampling::Upsampling(const GetWeight& get, const std::int64_t (&widths)[5], bool per_pixel, const Kernels& kernels)
    : kernels_(kernels), per_pixel_(per_pixel) {
    std::copy(std::begin(widths), std::end(widths), std::begin(widths_));
    for (int j = 0; j < 4; ++j) {
        const std::string name = "stages." + std::to_string(j);
        const std::int64_t in = widths[j];
        const std::int64_t out = widths[j + 1];
        const float* weight = get(name + ".conv.weight", {out, in, 3, 3});
        const std::int64_t words = words_of(in, kernels.pairs);
        float* taps = store_.take(out * 9 * words);
        for (std::int64_t c = 0; c < out; ++c) {
            for (std::int64_t tap = 0; tap < 9; ++tap) {
                float* to = taps + (c * 9 + tap) * words;
                for (std::int64_t k = 0; k < in; ++k) put(to, 1, k, weight[(c * in + k) * 9 + tap], kernels.pairs);
            }
        }
        stages_[j] = {taps, store_.copy(get(name + ".conv.bias", {out}), out, 1),
                      store_.copy(get(name + ".norm.weight", {in}), in, 1),
                      store_.copy(get(name + ".norm.bias", {in}), in, 1)};
    }
}

std::int64_t Upsampling::strip_rows(int index, std::int64_t height, std::int64_t width) const {
    const std::int64_t channels = std::min(kChannels, widths_[index + 1]);
    const std::int64_t fits = kStripFloats / (9 * channels * width) - 4;
    return std::min(height, std::max<std::int64_t>(fits, 4));
}

std::int64_t Upsampling::scratch_floats(int index, std::int64_t height, std::int64_t width) const {
    const std::int64_t channels = std::min(kChannels, widths_[index + 1]);
    const std::int64_t rows = std::min(strip_rows(index, height, width) + 4, height);
    const std::int64_t pixels = round_to(rows * width, kernels_.panel) + 2 * kernels_.panel;
    return round_to(9 * channels * pixels + kUpPad + 3 * (width + kUpPad) + 4 * width + 2 * kUpPad, 16);
}

void Upsampling::stage(int index, const float* z, std::int64_t height, std::int64_t width, const double* sums,
                       const TokenBox& box, std::int64_t rows, std::int64_t columns, const EdgeMaps& edges, float* out,
                       double* out_sums, float* memory, int workers) const {
    const Stage& weights = stages_[index];
    const std::int64_t in = widths_[index];
    const std::int64_t outputs = widths_[index + 1];
    const std::int64_t pixels = height * width;
    const std::int64_t P = kernels_.panel;
    const std::int64_t words = words_of(in, kernels_.pairs);

    // Normalised and packed once, for the products of all output channels.
    const std::int64_t n_panels = blocks_of(pixels, P);
    float* panels = memory;
    float* scale = panels + n_panels * words * P;
    float* shift = scale + round_to(in, 16);
    float* row_sums = shift + round_to(in, 16);  // [outputs][2 height][2]
    float* scratch = row_sums + round_to(4 * outputs * height, 16);
    const std::int64_t scratch_size = scratch_floats(index, height, width);
    if (per_pixel_) {
        std::copy_n(weights.norm_weight, in, scale);
        std::copy_n(weights.norm_bias, in, shift);
    } else {
        const double count = static_cast<double>(pixels) * static_cast<double>(in);
        const double mean = sums[0] / count;
        const double variance = std::max(sums[1] / count - mean * mean, 0.0);
        const double by = 1.0 / std::sqrt(variance + static_cast<double>(kNormEps));
        for (std::int64_t k = 0; k < in; ++k) {
            scale[k] = static_cast<float>(by * static_cast<double>(weights.norm_weight[k]));
            shift[k] = static_cast<float>(static_cast<double>(weights.norm_bias[k]) -
                                          mean * by * static_cast<double>(weights.norm_weight[k]));
        }
    }
    const PanelSource source{z, static_cast<std::ptrdiff_t>(pixels), in, scale, shift, per_pixel_};
    constexpr std::int64_t kPanelsAnItem = 16;
    for_items(blocks_of(n_panels, kPanelsAnItem), workers, [&](std::int64_t item, int) {
        const std::int64_t last = std::min((item + 1) * kPanelsAnItem, n_panels);
        for (std::int64_t p = item * kPanelsAnItem; p < last; ++p) {
            kernels_.pack_pixels(source, p * P, std::min(P, pixels - p * P), panels + p * words * P);
        }
    });

    const std::int64_t channels = std::min(kChannels, outputs);
    const std::int64_t strip = strip_rows(index, height, width);
    const std::int64_t strips = blocks_of(height, strip);
    const std::int64_t side = std::int64_t{2} << index;
    const EdgeLayout layout(outputs, rows, columns, index);
    for_items(blocks_of(outputs, channels) * strips, workers, [&](std::int64_t item, int worker) {
        const std::int64_t c0 = item / strips * channels;
        const std::int64_t n_channels = std::min(channels, outputs - c0);
        const std::int64_t r0 = item % strips * strip;
        const std::int64_t r1 = std::min(r0 + strip, height);
        const std::int64_t first = std::max<std::int64_t>(r0 - 2, 0) * width;  // of the pixels that are looked at
        const std::int64_t last = std::min(r1 + 2, height) * width;
        const std::int64_t p0 = first / P;
        const std::int64_t p1 = blocks_of(last, P);
        const std::int64_t stride = (p1 - p0) * P;
        float* products = scratch + worker * scratch_size;
        float* up_scratch = products + 9 * channels * (round_to(std::min(strip + 4, height) * width, P) + 2 * P) + kUpPad;
        float* edge = up_scratch + 3 * (width + kUpPad);
        float* line = edge + 2 * width + kUpPad;  // up_row writes whole vectors, so not straight into its place
        kernels_.taps(weights.taps + c0 * 9 * words, 9 * n_channels, in, panels + p0 * words * P, p1 - p0, products,
                      static_cast<std::ptrdiff_t>(stride));
        UpRow up{};
        up.width = width;
        up.edge = edge;
        up.silu = index < 3;
        up.out = line;
        for (std::int64_t c = 0; c < n_channels; ++c) {
            for (std::int64_t y = 2 * r0; y < 2 * r1; ++y) {
                up.count = 0;
                for (std::int64_t dy = 0; dy < 3; ++dy) {
                    const std::int64_t at = y + dy - 1;  // a row of the upsampled map
                    if (at < 0 || at >= 2 * height) continue;
                    const float* taps = at % 2 == 0 ? kEven : kOdd;
                    for (std::int64_t k = 0; k < 4; ++k) {
                        const std::int64_t r = std::clamp<std::int64_t>(at / 2 + k - (at % 2 == 0 ? 2 : 1), 0, height - 1);
                        for (std::int64_t dx = 0; dx < 3; ++dx) {
                            up.rows[dx][up.count] = products + (c * 9 + dy * 3 + dx) * stride + r * width - p0 * P;
                        }
                        up.weights[up.count++] = taps[k];
                    }
                }
                if (edges.packed != nullptr) {
                    edge_row(layout, Packed{edges.packed, edges.units, edges.middles + c0 + c, outputs}, weights.bias[c0 + c], c0 + c, box, side, y, edge);
                } else {
                    edge_row(layout, Exact{edges.exact}, weights.bias[c0 + c], c0 + c, box, side, y, edge);
                }
                kernels_.up_row(up, up_scratch, row_sums + ((c0 + c) * 2 * height + y) * 2);
                std::copy_n(line, 2 * width, out + ((c0 + c) * 2 * height + y) * 2 * width);
            }
        }
    });
    out_sums[0] = out_sums[1] = 0.0;
    for (std::int64_t i = 0; i < outputs * 2 * height; ++i) {
        out_sums[0] += static_cast<double>(row_sums[2 * i]);
        out_sums[1] += static_cast<double>(row_sums[2 * i + 1]);
    }
}

void Upsampling::run(const float* tokens, std::int64_t rows, std::int64_t columns, const TokenBox& box,
                     const EdgeMaps (&edges)[4], float* out) const {
    const std::int64_t height = box.bottom - box.top;
    const std::int64_t width = box.right - box.left;
    const std::int64_t d = widths_[0];
    std::int64_t map = d * height * width;  // the largest map, and the most working memory of a stage
    std::int64_t work = 0;
    const int workers = threads();
    for (int j = 0; j < 4; ++j) {
        const std::int64_t h = height << j;
        const std::int64_t w = width << j;
        map = std::max(map, widths_[j + 1] * 4 * h * w);
        work = std::max(work, round_to(h * w, kernels_.panel) * widths_[j] + 2 * round_to(widths_[j], 16) +
                                  round_to(4 * widths_[j + 1] * h, 16) + workers * scratch_floats(j, h, w));
    }
    map = round_to(map, 16) + kUpPad;
    auto* memory = reinterpret_cast<float*>(arena.get(static_cast<std::size_t>(2 * map + work + 4 * height) * sizeof(float)));
    float* here = memory;
    float* next = memory + map;
    float* space = memory + 2 * map;
    float* row_sums = space + work;

    // The crop, from token after token to planes.
    for_items(height, workers, [&](std::int64_t y, int) {
        constexpr std::int64_t kStep = 16;
        float sums[kStep] = {};
        float squares[kStep] = {};
        const float* from = tokens + ((box.top + y) * columns + box.left) * d;
        for (std::int64_t x = 0; x < width; x += kStep) {
            const std::int64_t nx = std::min(kStep, width - x);
            for (std::int64_t c = 0; c < d; c += kStep) {
                const std::int64_t nc = std::min(kStep, d - c);
                for (std::int64_t i = 0; i < nx; ++i) {
                    const float* token = from + (x + i) * d + c;
                    float* to = here + (c * height + y) * width + x + i;
                    for (std::int64_t k = 0; k < nc; ++k) {
                        to[k * height * width] = token[k];
                        sums[k] += token[k];
                        squares[k] += token[k] * token[k];
                    }
                }
            }
        }
        row_sums[2 * y] = row_sums[2 * y + 1] = 0.0F;
        for (std::int64_t k = 0; k < kStep; ++k) {
            row_sums[2 * y] += sums[k];
            row_sums[2 * y + 1] += squares[k];
        }
    });
    double sums[2] = {0.0, 0.0};
    for (std::int64_t y = 0; y < height; ++y) {
        sums[0] += static_cast<double>(row_sums[2 * y]);
        sums[1] += static_cast<double>(row_sums[2 * y + 1]);
    }
    for (int j = 0; j < 4; ++j) {
        double next_sums[2];
        stage(j, here, height << j, width << j, sums, box, rows, columns, edges[j], j == 3 ? out : next, next_sums, space,
              workers);
        std::swap(here, next);
        sums[0] = next_sums[0];
        sums[1] = next_sums[1];
    }
}

}  // namespace i2f
