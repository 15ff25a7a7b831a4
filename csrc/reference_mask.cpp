#include "reference_mask.h"

#include <algorithm>

#include "aligned.h"

namespace i2f {
namespace {

thread_local Arena arena;

}  // namespace

// The windows of neighbouring pixels overlap, so all windows of a token are constant iff the token, grown by the
// window's reach and clipped to the box, is constant. One minimum and one maximum a token replace one a pixel.
void edge_tokens(const Kernels& kernels, const std::uint8_t* state, std::ptrdiff_t row_stride, std::int64_t height,
                 std::int64_t width, const Box& box, bool constant_is_edge, std::int64_t patch, std::uint8_t* edge) {
    const auto columns = static_cast<std::size_t>(width);
    auto* const low = reinterpret_cast<std::uint8_t*>(arena.get(3 * round_up(columns, kAlignment)));
    std::uint8_t* const high = low + round_up(columns, kAlignment);
    std::uint8_t* const unknown = high + round_up(columns, kAlignment);
    for (std::int64_t top = 0; top < height; top += patch) {
        std::fill_n(unknown, columns, std::uint8_t{0});
        for (std::int64_t y = top; y < top + patch; ++y) {
            kernels.find(state + y * row_stride, width, kUnknown, unknown);
        }
        // Rows of the token inside the box, and those that their windows see.
        const std::int64_t first = std::max(top, box.top);
        const std::int64_t last = std::min(top + patch, box.bottom);
        if (first < last) {
            std::fill_n(low, columns, std::uint8_t{255});
            std::fill_n(high, columns, std::uint8_t{0});
            const std::int64_t end = std::min(last + kEdgeReach, box.bottom);
            for (std::int64_t y = std::max(first - kEdgeReach, box.top); y < end; ++y) {
                kernels.min_max(state + y * row_stride + box.left, box.right - box.left, low + box.left,
                                high + box.left);
            }
        }
        for (std::int64_t left = 0; left < width; left += patch) {
            bool is_edge = std::any_of(unknown + left, unknown + left + patch, [](std::uint8_t u) { return u != 0; });
            const std::int64_t from = std::max(left, box.left);
            const std::int64_t to = std::min(left + patch, box.right);
            if (!is_edge && first < last && from < to) {
                const std::int64_t begin = std::max(from - kEdgeReach, box.left);
                const std::int64_t end = std::min(to + kEdgeReach, box.right);
                const std::uint8_t smallest = *std::min_element(low + begin, low + end);
                const std::uint8_t largest = *std::max_element(high + begin, high + end);
                is_edge = constant_is_edge ? largest > 0 : smallest != largest;
            }
            *edge++ = is_edge ? 1 : 0;
        }
    }
}

}  // namespace i2f
