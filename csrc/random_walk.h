// The random walk of inter2former/random_walk.py, which says what it computes and why; that file is its twin.
//
// Runs on the caller's thread: it takes less than waking others would.
#pragma once

#include <cstddef>
#include <cstdint>

#include "upsampling.h"

namespace i2f {

constexpr std::int64_t kCells = 64;  // a side
constexpr std::int64_t kGrid = kCells * kCells;

struct WalkSettings {
    float trust;
    float softness;
    float sure;
    float nearly;
    std::int64_t iterations;
};

// links [4, kGrid]; inside and out [16 box rows, 16 box columns], which may be one array; state [size, size], of which
// size is a multiple of kCells. Throws std::bad_alloc.
void random_walk(const float* links, const float* inside, const TokenBox& box, const std::uint8_t* state,
                 std::ptrdiff_t row_stride, std::int64_t size, const WalkSettings& settings, float* out);

}  // namespace i2f
