// The portable path.
#include <cmath>

#include "kernels.h"

namespace i2f {
namespace {

#include "mask_kernels.inc"

#include "portable.inc"

constexpr bool kPairs = false;
constexpr int kTile = 6;  // 12 sums and their operands in 16 registers

#include "vector.inc"
#include "simd_kernels.inc"
#include "click_kernels.inc"
#include "convolution_kernels.inc"

}  // namespace

const Kernels kPortable = {
    "portable", "4 floats a step, any CPU", L, kTile, ffn, gates, min_max, find, transition,
    P, kPairs, linear, norm, pack_pixels, taps, up_row, attend, bsq, tile_in, tile_out, silu, sigmoid_of};

}  // namespace i2f
