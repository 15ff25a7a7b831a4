// The AVX-512 path with products in bfloat16 (F, BW, DQ, VL, BF16). Compiled with its own flags; only reached when the
// CPU has them.
#include <immintrin.h>

#include "kernels.h"

namespace i2f {
namespace {

#include "mask_kernels.inc"

#include "avx512.inc"

constexpr bool kPairs = true;
constexpr int kTile = 12;  // 24 sums, two weights and a broadcast in 32 registers

#include "vector.inc"
#include "simd_kernels.inc"
#include "click_kernels.inc"
#include "convolution_kernels.inc"

}  // namespace

const Kernels kAvx512Bf16 = {
    "avx512", "32 bfloat16 a step, x86 with AVX-512 F, BW, DQ, VL, BF16", L, kTile, ffn, gates, min_max, find, transition,
    P, kPairs, linear, norm, pack_pixels, taps, up_row, attend, bsq, tile_in, tile_out, silu, sigmoid_of};

}  // namespace i2f
