// The portable path with products in bfloat16: for CPUs without such instructions, so that they give the same answers
// (and no faster).
#include <cmath>

#include "kernels.h"

namespace i2f {
namespace {

#include "mask_kernels.inc"

#include "portable.inc"

constexpr bool kPairs = true;
constexpr int kTile = 6;  // 12 sums and their operands in 16 registers

#include "vector.inc"
#include "simd_kernels.inc"
#include "click_kernels.inc"
#include "convolution_kernels.inc"

}  // namespace

const Kernels kPortableBf16 = {
    "portable", "8 bfloat16 in two steps, any CPU", L, kTile, ffn, gates, min_max, find, transition,
    P, kPairs, linear, norm, pack_pixels, taps, up_row, attend, bsq, tile_in, tile_out, silu, sigmoid_of};

}  // namespace i2f
