// The AVX2 + FMA path. Compiled with its own flags; only reached when the CPU has them.
#include <immintrin.h>

#include "kernels.h"

namespace i2f {
namespace {

#include "mask_kernels.inc"

struct V {
    static constexpr std::int64_t lanes = 8;
    __m256 v;

    static __m256i first(std::int64_t count) {
        const int n = count >= lanes ? static_cast<int>(lanes) : static_cast<int>(count);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static V set(float value) { return {_mm256_set1_ps(value)}; }
    static V load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static V load_first(const float* from, std::int64_t count) {
        return count >= lanes ? load(from) : V{_mm256_maskload_ps(from, first(count))};
    }
    void store(float* to) const { _mm256_storeu_ps(to, v); }
    void store_first(float* to, std::int64_t count) const {
        if (count >= lanes) {
            store(to);
        } else {
            _mm256_maskstore_ps(to, first(count), v);
        }
    }
    V keep_first(std::int64_t count) const { return {_mm256_and_ps(v, _mm256_castsi256_ps(first(count)))}; }
    static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
    static V min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
    static V round(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
    static V scale(V a, V n) {  // a * 2^n for n in -126 .. 127
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
        return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
    }
    static float square_root(float a) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(a))); }
    V root() const { return {_mm256_sqrt_ps(v)}; }
    V inverse() const { return {_mm256_div_ps(_mm256_set1_ps(1.0F), v)}; }
    // a0 b0 a1 b1 ...
    static void zip(V a, V b, float* to) {
        const __m256 low = _mm256_unpacklo_ps(a.v, b.v);
        const __m256 high = _mm256_unpackhi_ps(a.v, b.v);
        _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
        _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
    float total() const {
        __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
        sum = _mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1));
        return _mm_cvtss_f32(sum);
    }
    float largest() const {
        __m128 top = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        top = _mm_max_ps(top, _mm_movehl_ps(top, top));
        return _mm_cvtss_f32(_mm_max_ss(top, _mm_shuffle_ps(top, top, 1)));
    }
    // The first lane that holds the number; `lanes` when none does.
    int first_of(float value) const {
        const int equal = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(value), _CMP_EQ_OQ));
        return __builtin_ctz(static_cast<unsigned>(equal) | 1U << lanes);
    }
};

inline V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V operator/(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }

constexpr bool kPairs = false;
constexpr int kTile = 6;  // 12 sums, two weights and a broadcast in 16 registers

#include "vector.inc"
#include "simd_kernels.inc"
#include "click_kernels.inc"
#include "convolution_kernels.inc"

}  // namespace

const Kernels kAvx2 = {
    "avx2", "8 floats a step, x86 with AVX2 and FMA", L, kTile, ffn, gates, min_max, find, transition,
    P, kPairs, linear, norm, pack_pixels, taps, up_row, attend, bsq, tile_in, tile_out, silu, sigmoid_of};

}  // namespace i2f
