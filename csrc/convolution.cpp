#include "convolution.h"

#include <algorithm>

namespace i2f {
namespace {

constexpr std::int64_t kSide = 4;  // pixels a tile
constexpr std::int64_t kPoints = 36;
constexpr std::int64_t kLeastRows = 12;  // tiles that fill a register tile
constexpr std::int64_t kGap = 16;  // floats between points, so that they do not meet in the same cache sets

// A line of three weights to six points; what the inputs' points are too large by is divided out here.
constexpr double kWeightPoints[6][3] = {
    {1.0, 0.0, 0.0},
    {1.0 / 3, 1.0 / 3, 1.0 / 3},
    {-1.0 / 3, 1.0 / 3, -1.0 / 3},
    {-16.0 / 15, -8.0 / 15, -4.0 / 15},
    {1.0 / 15, -2.0 / 15, 4.0 / 15},
    {0.0, 0.0, 1.0},
};

thread_local Arena arena;

}  // namespace

Convolution::Convolution(std::int64_t in, std::int64_t out, const float* weight, const float* bias,
                         const Kernels& kernels)
    : kernels_(kernels), in_(in), out_(out), bias_(store_.copy(bias, out, 1)) {
    for (std::int64_t p = 0; p < kPoints; ++p) {
        const double(&down)[3] = kWeightPoints[p / 6];
        const double(&across)[3] = kWeightPoints[p % 6];
        const auto at_point = [&](std::int64_t j, std::int64_t k) {
            const float* taps = weight + (j * in + k) * 9;
            double sum = 0.0;
            for (int tap = 0; tap < 9; ++tap) sum += down[tap / 3] * across[tap % 3] * static_cast<double>(taps[tap]);
            return static_cast<float>(sum);
        };
        points_[p] = store_.linear(in, out, kernels.panel, at_point, [](std::int64_t) { return 0.0F; });
    }
}

void Convolution::run(const ConvolutionCall& call, double (&sums)[2]) const {
    const std::int64_t tiles_across = blocks_of(call.width, kSide);
    const std::int64_t tiles = blocks_of(call.height, kSide) * tiles_across;
    const int workers = threads();
    // Small maps are cut into smaller parts, so that every thread has some.
    const std::int64_t rows = std::clamp(round_to(blocks_of(tiles, 4 * workers), kLeastRows), kLeastRows, kMaxRows);
    const std::int64_t items = blocks_of(tiles, rows);
    const std::int64_t in_point = kMaxRows * in_ + kGap;
    const std::int64_t out_point = kMaxRows * out_ + kGap;
    const std::int64_t scratch = round_to(kPoints * (in_point + out_point), kGap);
    const std::int64_t tile_sums = round_to(2 * tiles, kGap);
    auto* const memory =
        reinterpret_cast<float*>(arena.get(static_cast<std::size_t>(tile_sums + workers * scratch) * sizeof(float)));

    for_items(items, workers, [&](std::int64_t item, int worker) {
        float* const pixels = memory + tile_sums + worker * scratch;
        float* const products = pixels + kPoints * in_point;
        const std::int64_t first = item * rows;
        const std::int64_t count = std::min(rows, tiles - first);
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t y = (first + i) / tiles_across * kSide - 1;  // of the tile's pixel (0, 0)
            const std::int64_t x = (first + i) % tiles_across * kSide - 1;
            TileIn tile{};
            tile.top = y < 0 ? 1 : 0;
            tile.left = x < 0 ? 1 : 0;
            tile.bottom = static_cast<int>(std::min<std::int64_t>(6, call.height - y));
            tile.right = static_cast<int>(std::min<std::int64_t>(6, call.width - x));
            tile.x = call.x + ((y + tile.top) * call.width + x + tile.left) * in_;
            tile.row = static_cast<std::ptrdiff_t>(call.width * in_);
            tile.channels = in_;
            tile.scale = call.scale;
            tile.shift = call.shift;
            tile.out = pixels + i * in_;
            tile.point = static_cast<std::ptrdiff_t>(in_point);
            kernels_.tile_in(tile);
        }
        for (std::int64_t p = 0; p < kPoints; ++p) {
            kernels_.linear(points_[p], pixels + p * in_point, static_cast<std::ptrdiff_t>(in_), count, Finish::plain,
                            products + p * out_point, static_cast<std::ptrdiff_t>(out_));
        }
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t y = (first + i) / tiles_across * kSide;
            const std::int64_t x = (first + i) % tiles_across * kSide;
            const std::int64_t at = (y * call.width + x) * out_;
            TileOut tile{};
            tile.products = products + i * out_;
            tile.point = static_cast<std::ptrdiff_t>(out_point);
            tile.channels = out_;
            tile.bias = bias_;
            tile.add = call.add == nullptr ? nullptr : call.add + at;
            tile.silu = call.silu;
            tile.out = call.out + at;
            tile.row = static_cast<std::ptrdiff_t>(call.width * out_);
            tile.rows = static_cast<int>(std::min(kSide, call.height - y));
            tile.columns = static_cast<int>(std::min(kSide, call.width - x));
            kernels_.tile_out(tile, memory + 2 * (first + i));
        }
    }, call.lane);
    sums[0] = sums[1] = 0.0;
    for (std::int64_t i = 0; i < tiles; ++i) {
        sums[0] += static_cast<double>(memory[2 * i]);
        sums[1] += static_cast<double>(memory[2 * i + 1]);
    }
}

}  // namespace i2f
