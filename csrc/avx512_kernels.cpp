// The AVX-512 path (F, BW, DQ, VL). Compiled with its own flags; only reached when the CPU has them.
#include <immintrin.h>

#include "kernels.h"

namespace i2f {
namespace {

#include "mask_kernels.inc"

struct V {
    static constexpr std::int64_t lanes = 16;
    __m512 v;

    static __mmask16 first(std::int64_t count) {
        return count >= lanes ? __mmask16{0xFFFF} : static_cast<__mmask16>((1U << count) - 1U);
    }
    static V set(float value) { return {_mm512_set1_ps(value)}; }
    static V load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static V load_first(const float* from, std::int64_t count) { return {_mm512_maskz_loadu_ps(first(count), from)}; }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    void store_first(float* to, std::int64_t count) const { _mm512_mask_storeu_ps(to, first(count), v); }
    V keep_first(std::int64_t count) const { return {_mm512_maskz_mov_ps(first(count), v)}; }
    static V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
    static V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
    static V round(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static V scale(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n
    static float square_root(float a) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(a))); }
    V root() const { return {_mm512_sqrt_ps(v)}; }
    // a0 b0 a1 b1 ...
    static void zip(V a, V b, float* to) {
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        _mm512_storeu_ps(to, _mm512_permutex2var_ps(a.v, low, b.v));
        _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(a.v, high, b.v));
    }
    float total() const { return _mm512_reduce_add_ps(v); }
};

inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }

constexpr int kTile = 12;  // 24 sums, two weights and a broadcast in 32 registers

#include "vector.inc"
#include "simd_kernels.inc"
#include "click_kernels.inc"

}  // namespace

const Kernels kAvx512 = {
    "avx512", "16 floats a step, x86 with AVX-512 F, BW, DQ, VL", L, kTile, ffn, gates, min_max, find, transition,
    P, linear, norm, pack_pixels, taps, up_row, attend, bsq};

}  // namespace i2f
