#include "random_walk.h"

#include <algorithm>
#include <cmath>

#include "aligned.h"

namespace i2f {
namespace {

thread_local Arena arena;

// Links go from a cell to the right, below, below right and below left; those that would leave the grid or go around
// its border are 0, so that all loops run over a flat array with a margin of zeros on either side.
constexpr std::int64_t kMargin = 80;
static_assert(kMargin > kCells + 1);
constexpr std::int64_t kRoom = kGrid + 2 * kMargin;
constexpr std::int64_t kLanes = 16;  // partial sums; the same ones whatever the vectors of the CPU

double dot(const float* __restrict a, const float* __restrict b) {
    double total = 0.0;
    for (std::int64_t row = 0; row < kGrid; row += 8 * kLanes) {
        float sums[kLanes] = {};
        for (std::int64_t i = row; i < row + 8 * kLanes; i += kLanes) {
            for (std::int64_t j = 0; j < kLanes; ++j) sums[j] += a[i + j] * b[i + j];
        }
        for (const float sum : sums) total += static_cast<double>(sum);
    }
    return total;
}

// out = leave x - sum of links times neighbours
void spread(float* const* links, const float* __restrict leave, const float* __restrict x, float* __restrict out) {
    const float *const right = links[0], *const below = links[1], *const falling = links[2], *const rising = links[3];
    for (std::int64_t i = 0; i < kGrid; ++i) {
        const float near = right[i] * x[i + 1] + right[i - 1] * x[i - 1] + below[i] * x[i + kCells] +
                           below[i - kCells] * x[i - kCells];
        const float across = falling[i] * x[i + kCells + 1] + falling[i - kCells - 1] * x[i - kCells - 1] +
                             rising[i] * x[i + kCells - 1] + rising[i - kCells + 1] * x[i - kCells + 1];
        out[i] = leave[i] * x[i] - (near + across);
    }
}

// What is known of a cell from its pixels.
struct Cells {
    float *said, *object, *background;
};

bool has_clicks(const std::uint8_t* __restrict states, std::int64_t count) {
    std::uint8_t found = 0;
    for (std::int64_t x = 0; x < count; ++x) {
        found = static_cast<std::uint8_t>(found | (states[x] == 0) | (states[x] == 4));
    }
    return found != 0;
}

// `columns` has room for a row of pixels.
void look(const float* inside, const TokenBox& box, const std::uint8_t* state, std::ptrdiff_t row_stride,
          std::int64_t size, const WalkSettings& settings, float* columns, const Cells& cells) {
    const std::int64_t side = size / kCells;
    const std::int64_t left = 16 * box.left, top = 16 * box.top, width = 16 * box.right - left, bottom = 16 * box.bottom;
    const float share = 1.0F / static_cast<float>(side * side);
    const float sure = settings.sure;
    for (std::int64_t row = 0; row < kCells; ++row) {
        float* const said = cells.said + row * kCells;
        float* const object = cells.object + row * kCells;
        float* const background = cells.background + row * kCells;
        std::fill_n(object, kCells, 0.0F);
        std::fill_n(background, kCells, 0.0F);
        for (std::int64_t y = row * side; y < (row + 1) * side; ++y) {
            const std::uint8_t* const states = state + y * row_stride;
            if (!has_clicks(states, size)) continue;
            for (std::int64_t x = 0; x < size; ++x) {
                if (states[x] == 0) background[x / side] += share;
                if (states[x] == 4) object[x / side] += share;
            }
        }
        // Sums of columns first: they are vectors.
        std::fill_n(columns, width, 0.0F);
        const std::int64_t begin = std::clamp(row * side, top, bottom), end = std::clamp((row + 1) * side, top, bottom);
        for (std::int64_t y = begin; y < end; ++y) {
            const float* const logits = inside + (y - top) * width;
            for (std::int64_t x = 0; x < width; ++x) {
                columns[x] += std::min(std::max(logits[x], -sure), sure);
            }
        }
        for (std::int64_t column = 0; column < kCells; ++column) {
            const std::int64_t from = std::clamp<std::int64_t>(column * side - left, 0, width);
            const std::int64_t to = std::clamp<std::int64_t>((column + 1) * side - left, 0, width);
            const std::int64_t unknown = side * side - (end - begin) * (to - from);
            float sum = static_cast<float>(unknown) * -sure;
            for (std::int64_t x = from; x < to; ++x) sum += columns[x];
            said[column] = 1.0F / (1.0F + std::exp(sum * share / -settings.softness));
        }
    }
}

// Conjugate gradients from x = said; the arrays have margins.
void solve(float* const* links, const Cells& cells, const WalkSettings& settings, float* x, float* leave,
           float* residual, float* direction, float* product) {
    std::fill_n(x - kMargin, kRoom, 1.0F);
    std::fill_n(leave, kGrid, 0.0F);
    spread(links, leave, x, product);  // minus the sum of a cell's links
    for (std::int64_t i = 0; i < kGrid; ++i) {
        leave[i] = settings.trust - product[i] + cells.object[i] + cells.background[i];
    }
    std::fill_n(x - kMargin, kRoom, 0.0F);
    std::copy_n(cells.said, kGrid, x);
    spread(links, leave, x, product);
    for (std::int64_t i = 0; i < kGrid; ++i) {
        residual[i] = settings.trust * cells.said[i] + cells.object[i] - product[i];
    }
    float* const scaled = cells.said;  // no longer needed
    for (std::int64_t i = 0; i < kGrid; ++i) scaled[i] = residual[i] / leave[i];
    std::fill_n(direction - kMargin, kRoom, 0.0F);
    std::copy_n(scaled, kGrid, direction);
    double energy = dot(residual, scaled);
    for (std::int64_t n = 0; n < settings.iterations && energy >= 1e-12; ++n) {
        spread(links, leave, direction, product);
        const auto length = static_cast<float>(energy / dot(direction, product));
        for (std::int64_t i = 0; i < kGrid; ++i) {
            x[i] += length * direction[i];
            residual[i] -= length * product[i];
            scaled[i] = residual[i] / leave[i];
        }
        const double before = energy;
        energy = dot(residual, scaled);
        const auto ratio = static_cast<float>(energy / before);
        for (std::int64_t i = 0; i < kGrid; ++i) direction[i] = scaled[i] + ratio * direction[i];
    }
}

// out = share inside + bilinear interpolation of the cells' values
void draw(const float* cells, const float* inside, const TokenBox& box, std::int64_t size, const WalkSettings& settings,
          float* scratch, float* out) {
    const std::int64_t side = size / kCells;
    const std::int64_t left = 16 * box.left, width = 16 * (box.right - box.left), top = 16 * box.top;
    const float share = 1.0F - 1.0F / settings.softness;
    const float sure = settings.sure;
    const float step = 1.0F / static_cast<float>(side);
    float* const line = scratch;              // a row of cells, its ends repeated
    float* const pixels = line + kCells + 2;  // the same in pixels, half a cell more on either side
    for (std::int64_t y = 0; y < 16 * (box.bottom - box.top); ++y) {
        const float place = (static_cast<float>(top + y) + 0.5F) * step - 0.5F;
        const float whole = std::floor(place);
        const float weight = place - whole;
        const auto above = static_cast<std::int64_t>(whole);
        const float* const upper = cells + std::max<std::int64_t>(above, 0) * kCells;
        const float* const lower = cells + std::min<std::int64_t>(above + 1, kCells - 1) * kCells;
        for (std::int64_t k = 0; k < kCells; ++k) line[k + 1] = upper[k] + weight * (lower[k] - upper[k]);
        line[0] = line[1];
        line[kCells + 1] = line[kCells];
        for (std::int64_t k = 0; k <= kCells; ++k) {
            const float difference = line[k + 1] - line[k];
            for (std::int64_t j = 0; j < side; ++j) {
                pixels[k * side + j] = line[k] + (static_cast<float>(j) + 0.5F) * step * difference;
            }
        }
        const float* const moved = pixels + side / 2 + left;
        for (std::int64_t x = 0; x < width; ++x) {
            out[y * width + x] = std::min(std::max(inside[y * width + x], -sure), sure) * share + moved[x];
        }
    }
}

}  // namespace

void random_walk(const float* links, const float* inside, const TokenBox& box, const std::uint8_t* state,
                 std::ptrdiff_t row_stride, std::int64_t size, const WalkSettings& settings, float* out) {
    constexpr std::int64_t kArrays = 8 + 4;
    const std::int64_t floats = kArrays * kRoom + size + size / kCells + 2 * kCells;
    auto* next = reinterpret_cast<float*>(arena.get(static_cast<std::size_t>(floats) * sizeof(float)));
    const auto take = [&next] {
        float* const array = next + kMargin;
        next += kRoom;
        return array;
    };
    float* padded[4];
    for (std::int64_t n = 0; n < 4; ++n) {
        padded[n] = take();
        std::fill_n(padded[n] - kMargin, kRoom, 0.0F);
        std::copy_n(links + n * kGrid, kGrid, padded[n]);
    }
    const Cells cells{take(), take(), take()};
    float *const x = take(), *const leave = take(), *const residual = take(), *const direction = take(),
                 *const product = take();
    look(inside, box, state, row_stride, size, settings, next, cells);
    solve(padded, cells, settings, x, leave, residual, direction, product);
    for (std::int64_t i = 0; i < kGrid; ++i) {
        const float chance = std::min(std::max(x[i], settings.nearly), 1.0F - settings.nearly);
        x[i] = std::log(chance / (1.0F - chance));
    }
    draw(x, inside, box, size, settings, next, out);
}

}  // namespace i2f
