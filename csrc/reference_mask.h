// Byte operations on the reference mask: uint8 [height, width], states 0 .. 4.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace i2f {

struct Box {
    std::int64_t left, top, right, bottom;  // half-open, pixels
};

constexpr std::uint8_t kUnknown = 2;
constexpr std::int64_t kEdgeReach = 3;  // of the 7 x 7 window

// edge[ty, tx] = 1 for tokens of patch x patch pixels that need full attention. height and width are multiples of
// patch; the box lies inside. `constant_is_edge`: the "released" rule. Throws std::bad_alloc.
void edge_tokens(const Kernels& kernels, const std::uint8_t* state, std::ptrdiff_t row_stride, std::int64_t height,
                 std::int64_t width, const Box& box, bool constant_is_edge, std::int64_t patch, std::uint8_t* edge);

}  // namespace i2f
