#include "evidence.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "random_walk.h"

namespace i2f {
namespace {

constexpr double kSure = 7.0;       // logits of shares end here
constexpr double kUnsure = 1.3862943611198908;  // logit of probability 0.8
constexpr float kEnd = 30.0F;       // exponents end here
// Chamfer distances of OpenCV's 3 x 3 mask, in 1 / 65536: to a side and to a corner.
constexpr std::int32_t kSide = 62587;
constexpr std::int32_t kCorner = 89738;
constexpr std::int32_t kFar = 1 << 30;

double logit(double share) {
    share = std::min(std::max(share, 1e-9), 1.0 - 1e-9);
    return std::min(std::max(std::log(share / (1.0 - share)), -kSure), kSure);
}

// Sums over the masks of all levels. Masks shrink as levels rise, so a pixel is told by how many hold it.
struct Sums {
    double inside = 0, all = 0;  // of probabilities
    std::int64_t area = 0, unsure = 0, both = 0;
    double across = 0, within = 0;
    std::int64_t border = 0;
    std::int64_t top = -1, bottom = -1, left = -1, right = -1;
    std::int64_t largest = 0;           // part
    std::int32_t first = 0, deepest = 0;  // distance of the first click, and the largest
};

class Parts {
public:
    explicit Parts(std::int64_t count) : parent_(static_cast<std::size_t>(count)), size_(static_cast<std::size_t>(count), 1) {
        std::iota(parent_.begin(), parent_.end(), 0);
    }
    void join(std::int32_t a, std::int32_t b) {
        a = root(a);
        b = root(b);
        if (a == b) return;
        if (size_[static_cast<std::size_t>(a)] < size_[static_cast<std::size_t>(b)]) std::swap(a, b);
        parent_[static_cast<std::size_t>(b)] = a;
        size_[static_cast<std::size_t>(a)] += size_[static_cast<std::size_t>(b)];
        largest_ = std::max<std::int64_t>(largest_, size_[static_cast<std::size_t>(a)]);
    }
    std::int64_t largest() const { return largest_; }

private:
    std::int32_t root(std::int32_t n) {
        while (parent_[static_cast<std::size_t>(n)] != n) {
            parent_[static_cast<std::size_t>(n)] = parent_[static_cast<std::size_t>(parent_[static_cast<std::size_t>(n)])];
            n = parent_[static_cast<std::size_t>(n)];
        }
        return n;
    }
    std::vector<std::int32_t> parent_, size_;
    std::int64_t largest_ = 1;
};

// Largest part of every mask, by corners too: pixels join from the highest level down.
void measure_parts(const Seen& seen, const std::vector<std::uint8_t>& held, int n_levels, Sums* sums) {
    const std::int64_t rows = seen.rows, columns = seen.columns;
    std::vector<std::vector<std::int32_t>> at(static_cast<std::size_t>(n_levels) + 1);
    for (std::size_t p = 0; p < held.size(); ++p) at[held[p]].push_back(static_cast<std::int32_t>(p));
    Parts parts(rows * columns);
    for (int level = n_levels - 1; level >= 0; --level) {
        const auto holds = static_cast<std::uint8_t>(level + 1);
        for (const std::int32_t p : at[holds]) {
            const std::int64_t row = p / columns, column = p % columns;
            for (std::int64_t y = std::max<std::int64_t>(row - 1, 0); y <= std::min(row + 1, rows - 1); ++y) {
                for (std::int64_t x = std::max<std::int64_t>(column - 1, 0); x <= std::min(column + 1, columns - 1); ++x) {
                    const std::int64_t q = y * columns + x;
                    if (q != p && held[static_cast<std::size_t>(q)] >= holds) parts.join(p, static_cast<std::int32_t>(q));
                }
            }
        }
        sums[level].largest = parts.largest();
    }
}

// Distances from every pixel of each mask to its outside, which also surrounds the map; kLanes masks at a time.
template <int kLanes>
void measure_depth(const Seen& seen, const std::vector<std::uint8_t>& held, int n_levels, Sums* sums) {
    const std::int64_t rows = seen.rows, columns = seen.columns, wide = columns + 2;
    std::vector<std::int32_t> depth(static_cast<std::size_t>((rows + 2) * wide * kLanes), 0);
    const auto at = [&](std::int64_t y, std::int64_t x) { return depth.data() + ((y + 1) * wide + x + 1) * kLanes; };
    for (std::int64_t y = 0; y < rows; ++y) {
        for (std::int64_t x = 0; x < columns; ++x) {
            std::int32_t* const d = at(y, x);
            const std::int32_t *const a = at(y - 1, x - 1), *const b = at(y - 1, x), *const c = at(y - 1, x + 1),
                               *const e = at(y, x - 1);
            const int holds = held[static_cast<std::size_t>(y * columns + x)];
            for (int n = 0; n < kLanes; ++n) {
                const std::int32_t near = std::min(std::min(a[n], c[n]) + kCorner, std::min(b[n], e[n]) + kSide);
                d[n] = n < holds ? std::min(near, kFar) : 0;
            }
        }
    }
    std::int32_t deepest[kLanes] = {};
    for (std::int64_t y = rows - 1; y >= 0; --y) {
        for (std::int64_t x = columns - 1; x >= 0; --x) {
            std::int32_t* const d = at(y, x);
            const std::int32_t *const a = at(y + 1, x + 1), *const b = at(y + 1, x), *const c = at(y + 1, x - 1),
                               *const e = at(y, x + 1);
            for (int n = 0; n < kLanes; ++n) {
                const std::int32_t near = std::min(std::min(a[n], c[n]) + kCorner, std::min(b[n], e[n]) + kSide);
                d[n] = std::min(d[n], near);
                deepest[n] = std::max(deepest[n], d[n]);
            }
        }
    }
    for (int n = 0; n < n_levels; ++n) {
        sums[n].deepest = deepest[n];
        sums[n].first = at(seen.clicks[0].row, seen.clicks[0].column)[n];
    }
}

// Depth of the last click in the mask before it when it is negative, or in its outside.
double error_depth(const Seen& seen) {
    if (seen.count == 0 || seen.previous == nullptr) return 0.0;
    const SeenClick& last = seen.clicks[seen.count - 1];
    std::int64_t nearest = std::min(std::min(last.row + 1, last.column + 1), std::min(seen.rows - last.row, seen.columns - last.column));
    nearest *= nearest;
    for (std::int64_t y = 0; y < seen.rows; ++y) {
        for (std::int64_t x = 0; x < seen.columns; ++x) {
            if ((seen.previous[y * seen.columns + x] != 0) != last.positive) continue;
            const std::int64_t dy = y - last.row, dx = x - last.column;
            nearest = std::min(nearest, dy * dy + dx * dx);
        }
    }
    return std::sqrt(static_cast<double>(nearest));
}

double measure_links(const Seen& seen, const std::vector<std::uint8_t>& held, Sums* sums) {
    constexpr std::int64_t kDown[4] = {0, 1, 1, 1}, kRight[4] = {1, 0, 1, -1};
    double everywhere = 0;
    for (int way = 0; way < 4; ++way) {
        const float* const links = seen.links + way * kGrid;
        for (std::int64_t y = 0; y + kDown[way] < seen.rows; ++y) {
            for (std::int64_t x = std::max<std::int64_t>(-kRight[way], 0);
                 x < seen.columns - std::max<std::int64_t>(kRight[way], 0); ++x) {
                const double link = static_cast<double>(links[y * kCells + x]);
                const int here = held[static_cast<std::size_t>(y * seen.columns + x)];
                const int there = held[static_cast<std::size_t>((y + kDown[way]) * seen.columns + x + kRight[way])];
                everywhere += link;
                for (int n = 0; n < here; ++n) sums[n].within += link;
                for (int n = std::min(here, there); n < std::max(here, there); ++n) {
                    sums[n].across += link;
                    ++sums[n].border;
                }
            }
        }
    }
    return everywhere;
}

void measure_pixels(const Seen& seen, const float* levels, int n_levels, std::vector<std::uint8_t>& held, Sums* sums) {
    float raised[kMaxLevels];
    for (int n = 0; n < n_levels; ++n) raised[n] = std::exp(levels[n]);
    for (std::int64_t y = 0; y < seen.rows; ++y) {
        for (std::int64_t x = 0; x < seen.columns; ++x) {
            const std::int64_t p = y * seen.columns + x;
            const float value = seen.logits[p];
            const float e = std::exp(-std::min(std::max(value, -kEnd), kEnd));
            int holds = 0;
            for (int n = 0; n < n_levels; ++n) {
                Sums& sum = sums[n];
                const double chance = static_cast<double>(1.0F / (1.0F + e * raised[n]));
                sum.all += chance;
                sum.unsure += std::abs(static_cast<double>(value - levels[n])) < kUnsure;
                if (!(value - levels[n] > 0)) continue;
                holds = n + 1;
                sum.inside += chance;
                ++sum.area;
                if (seen.previous != nullptr && seen.previous[p] != 0) ++sum.both;
                if (sum.top < 0) sum.top = y;
                sum.bottom = y;
                sum.left = sum.left < 0 ? x : std::min(sum.left, x);
                sum.right = std::max(sum.right, x);
            }
            held[static_cast<std::size_t>(p)] = static_cast<std::uint8_t>(holds);
        }
    }
}

}  // namespace

void describe(const Seen& seen, const float* levels, int n_levels, bool* found, double* numbers) {
    const std::int64_t pixels = seen.rows * seen.columns;
    std::vector<std::uint8_t> held(static_cast<std::size_t>(pixels), 0);
    Sums sums[kMaxLevels];
    measure_pixels(seen, levels, n_levels, held, sums);
    measure_parts(seen, held, n_levels, sums);
    if (seen.count > 0) {
        if (n_levels == 1) {
            measure_depth<1>(seen, held, n_levels, sums);
        } else {
            measure_depth<kMaxLevels>(seen, held, n_levels, sums);
        }
    }
    const double depth = error_depth(seen);
    const double everywhere = seen.links == nullptr ? 0.0 : measure_links(seen, held, sums);
    const auto before = seen.previous == nullptr
                            ? std::int64_t{0}
                            : static_cast<std::int64_t>(std::count_if(seen.previous, seen.previous + pixels,
                                                                      [](std::uint8_t flag) { return flag != 0; }));
    for (int n = 0; n < n_levels; ++n) {
        const Sums& sum = sums[n];
        found[n] = sum.area > 0;
        double* out = numbers + n * (kEvidence + (seen.links == nullptr ? 0 : kShape));
        if (!found[n]) continue;
        const auto area = static_cast<double>(sum.area);
        *out++ = logit(sum.inside / area);
        *out++ = logit(sum.inside / sum.all);
        *out++ = std::min(static_cast<double>(sum.unsure) / area, 2.0);
        *out++ = std::log(area / static_cast<double>(pixels));
        *out++ = seen.previous == nullptr ? 0.0
                                          : static_cast<double>(sum.both) / static_cast<double>(sum.area + before - sum.both);
        *out++ = std::log(std::min(depth / std::sqrt(area), 2.0) + 0.02);
        *out++ = std::log(static_cast<double>(1 + seen.count));
        *out++ = seen.count > 0 ? static_cast<double>(seen.clicks[seen.count - 1].positive) : 1.0;
        *out++ = seen.count > 0 ? static_cast<double>(sum.first) / static_cast<double>(sum.deepest) : 0.5;
        *out++ = 1.0 - static_cast<double>(sum.largest) / area;
        if (seen.links == nullptr) continue;
        const auto height = static_cast<double>(sum.bottom - sum.top + 1), width = static_cast<double>(sum.right - sum.left + 1);
        const double around = std::max(static_cast<double>(sum.border), 1.0);
        const double lesser = std::max(std::min(sum.within, everywhere - sum.within), 1e-3);
        *out++ = std::log(1e-4 + sum.across / around);
        *out++ = std::log(1e-4 + sum.across / lesser);
        *out++ = area / (height * width);
        *out++ = std::log(height / width);
        *out++ = static_cast<double>(sum.top == 0 || sum.left == 0 || sum.bottom == seen.rows - 1 ||
                                     sum.right == seen.columns - 1);
        *out++ = std::log(around / std::sqrt(area));
    }
}

}  // namespace i2f
