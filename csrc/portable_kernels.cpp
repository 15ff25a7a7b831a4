// The portable path: the compiler's own four-float vectors, which every processor family has (SSE2, NEON, ...).
#include <cmath>

#include "kernels.h"

namespace i2f {
namespace {

#include "mask_kernels.inc"

typedef float Floats __attribute__((vector_size(16)));
typedef float UnalignedFloats __attribute__((vector_size(16), aligned(4), may_alias));
typedef std::int32_t Integers __attribute__((vector_size(16)));

struct V {
    static constexpr std::int64_t lanes = 4;
    Floats v;

    static V set(float value) { return {Floats{value, value, value, value}}; }
    static V load(const float* from) { return {*reinterpret_cast<const UnalignedFloats*>(from)}; }
    static V load_first(const float* from, std::int64_t count) {
        if (count >= lanes) return load(from);
        Floats some{};
        for (std::int64_t j = 0; j < count; ++j) some[j] = from[j];
        return {some};
    }
    void store(float* to) const { *reinterpret_cast<UnalignedFloats*>(to) = v; }
    void store_first(float* to, std::int64_t count) const {
        if (count >= lanes) return store(to);
        for (std::int64_t j = 0; j < count; ++j) to[j] = v[j];
    }
    V keep_first(std::int64_t count) const {
        Floats some = v;
        for (std::int64_t j = count; j < lanes; ++j) some[j] = 0.0F;
        return {some};
    }
    static V fma(V a, V b, V c) { return {a.v * b.v + c.v}; }  // rounds twice; not every family can do better
    static V max(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
    static V min(V a, V b) { return {a.v < b.v ? a.v : b.v}; }
    static V round(V a) {  // to the nearest, for |a| < 2^22: above 2^23 floats have no fraction
        const Floats shift = set(12582912.0F).v;
        return {a.v + shift - shift};
    }
    static V scale(V a, V n) {  // a * 2^n for n in -126 .. 127
        const Integers exponent = (__builtin_convertvector(n.v, Integers) + 127) << 23;
        return {a.v * (Floats)exponent};  // a cast between vectors keeps the bits
    }
    static float square_root(float a) { return std::sqrt(a); }
    V root() const { return {Floats{std::sqrt(v[0]), std::sqrt(v[1]), std::sqrt(v[2]), std::sqrt(v[3])}}; }
    // a0 b0 a1 b1 ...
    static void zip(V a, V b, float* to) {
        V{Floats{a.v[0], b.v[0], a.v[1], b.v[1]}}.store(to);
        V{Floats{a.v[2], b.v[2], a.v[3], b.v[3]}}.store(to + 4);
    }
    float total() const { return (v[0] + v[2]) + (v[1] + v[3]); }
};

inline V operator+(V a, V b) { return {a.v + b.v}; }
inline V operator-(V a, V b) { return {a.v - b.v}; }
inline V operator*(V a, V b) { return {a.v * b.v}; }
inline V operator/(V a, V b) { return {a.v / b.v}; }

constexpr int kTile = 6;  // 12 sums and their operands in 16 registers

#include "vector.inc"
#include "simd_kernels.inc"
#include "click_kernels.inc"

}  // namespace

const Kernels kPortable = {
    "portable", "4 floats a step, any CPU", L, kTile, ffn, gates, min_max, find, transition,
    P, linear, norm, pack_pixels, taps, up_row, attend, bsq};

}  // namespace i2f
