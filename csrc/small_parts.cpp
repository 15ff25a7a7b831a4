#include "small_parts.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace i2f {
namespace {

// Pixels of one side beside each other. A part is a tree of runs, its root the one that is its own parent.
struct Run {
    std::int32_t row;
    std::int32_t begin;
    std::int32_t end;
    std::int32_t parent;
};

std::int32_t root_of(std::vector<Run>& runs, std::int32_t n) {
    while (runs[n].parent != n) {
        runs[n].parent = runs[runs[n].parent].parent;
        n = runs[n].parent;
    }
    return n;
}

void join(std::vector<Run>& runs, std::int32_t a, std::int32_t b) {
    a = root_of(runs, a);
    b = root_of(runs, b);
    runs[std::max(a, b)].parent = std::min(a, b);
}

// Appends the runs of a row, of pixels whose byte is 1.
void find_runs(const std::uint8_t* side, std::int32_t columns, std::int32_t row, std::vector<Run>& runs) {
    const std::uint8_t* const stop = side + columns;
    const std::uint8_t* at = side;
    while (at < stop) {
        const void* const begin = std::memchr(at, 1, static_cast<std::size_t>(stop - at));
        if (begin == nullptr) return;
        at = static_cast<const std::uint8_t*>(begin);
        const auto first = static_cast<std::int32_t>(at - side);
        const void* const end = std::memchr(at, 0, static_cast<std::size_t>(stop - at));
        at = end == nullptr ? stop : static_cast<const std::uint8_t*>(end);
        runs.push_back({row, first, static_cast<std::int32_t>(at - side), static_cast<std::int32_t>(runs.size())});
    }
}

// Joins the runs from `first` on, of one row, to those of the row above it, which begin at `above`. With `reach` 1
// pixels touch at their corners.
void join_rows(std::vector<Run>& runs, std::int32_t above, std::int32_t first, std::int32_t reach) {
    for (auto n = first; n < static_cast<std::int32_t>(runs.size()); ++n) {
        while (above < first && runs[above].end + reach <= runs[n].begin) ++above;
        for (std::int32_t m = above; m < first && runs[m].begin < runs[n].end + reach; ++m) join(runs, m, n);
    }
}

}  // namespace

bool flip_small_parts(const float* logits, std::int64_t rows, std::int64_t columns, const std::uint8_t* spoken,
                      std::ptrdiff_t spoken_stride, const SmallParts& settings, float* out) {
    std::vector<Run> runs;
    std::vector<std::uint8_t> side(static_cast<std::size_t>(columns));
    std::int32_t above = 0;
    for (std::int64_t y = 0; y < rows; ++y) {
        const float* const row = logits + y * columns;
        for (std::int64_t x = 0; x < columns; ++x) side[x] = (row[x] > 0) == settings.inside ? 1 : 0;
        const auto first = static_cast<std::int32_t>(runs.size());
        find_runs(side.data(), static_cast<std::int32_t>(columns), static_cast<std::int32_t>(y), runs);
        join_rows(runs, above, first, settings.inside ? 1 : 0);
        above = first;
    }

    std::vector<std::int64_t> areas(runs.size());
    std::vector<std::uint8_t> stays(runs.size());
    std::int64_t all = 0;
    for (std::int32_t n = 0; n < static_cast<std::int32_t>(runs.size()); ++n) {
        const Run& run = runs[n];
        const std::int32_t root = root_of(runs, n);
        const std::int32_t length = run.end - run.begin;
        areas[root] += length;
        all += length;
        const bool at_border = run.row == 0 || run.row + 1 == rows || run.begin == 0 || run.end == columns;
        const std::uint8_t* const said = spoken + run.row * spoken_stride + run.begin;
        if ((at_border && !settings.inside) || std::memchr(said, 1, static_cast<std::size_t>(length)) != nullptr) {
            stays[root] = 1;
        }
    }
    std::int64_t whole = rows * columns - all;  // the mask, when `all` is what is not in it
    if (settings.inside) whole = areas.empty() ? 0 : *std::max_element(areas.begin(), areas.end());
    const double limit = settings.share * static_cast<double>(whole);

    bool any = false;
    for (std::int32_t n = 0; n < static_cast<std::int32_t>(runs.size()); ++n) {
        const Run& run = runs[n];
        const std::int32_t root = root_of(runs, n);
        if (stays[root] != 0 || !(static_cast<double>(areas[root]) < limit)) continue;
        if (!any) std::copy(logits, logits + rows * columns, out);
        any = true;
        for (std::int64_t i = run.row * columns + run.begin; i < run.row * columns + run.end; ++i) {
            out[i] = settings.inside ? -std::max(logits[i], settings.least) : std::max(-logits[i], settings.least);
        }
    }
    return any;
}

}  // namespace i2f
