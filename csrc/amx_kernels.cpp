// The AVX-512 path whose products in bfloat16 are those of AMX: a tile of 16 rows of 32 terms times a tile of 32 terms of
// 16 columns in one instruction, eight times the work of AVX-512's in the same time. Compiled with its own flags; only
// reached when the CPU has them and the system has given leave (dispatch.cpp).
#include <immintrin.h>

#include "kernels.h"

namespace i2f {
namespace {

#include "mask_kernels.inc"

#include "avx512.inc"

constexpr bool kPairs = true;
constexpr int kTile = 12;      // of float32: 24 sums, two weights and a broadcast in 32 registers
constexpr int kPairTile = 16;  // a tile register's rows

// The tile registers: 0, 1 sums of 16 rows, 2, 3 sums of the rows that are left, 4 and 5 their x, 6 and 7 weights.
struct alignas(64) Layout {
    std::uint8_t palette = 1;
    std::uint8_t start = 0;
    std::uint8_t unused[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {kPairTile, kPairTile, kPairTile, kPairTile, kPairTile, kPairTile, kPairTile, kPairTile};
};

thread_local int rows_left = 0;  // of registers 2, 3 and 5

inline void lay_out(int left) {
    Layout layout;
    layout.rows[2] = layout.rows[3] = layout.rows[5] = static_cast<std::uint8_t>(left);
    rows_left = left;
    _tile_loadconfig(&layout);
}

// Compilers do not know what tile instructions read.
inline void written(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// The last words of a product, fewer than a tile has, with zeros behind.
struct LastWords {
    alignas(64) float x[kPairTile * V::lanes];
    alignas(64) float panel[2 * V::lanes * V::lanes];

    LastWords(const float* x_from, std::ptrdiff_t stride, int rows, const float* panel_from, std::int64_t words) {
        for (int i = 0; i < rows; ++i) V::load_first(x_from + i * stride, words).store(x + i * V::lanes);
        for (std::int64_t k = 0; k < V::lanes; ++k) {
            for (std::int64_t j = 2 * V::lanes * k; j < 2 * V::lanes * (k + 1); j += V::lanes) {
                (k < words ? V::load(panel_from + j) : V::set(0.0F)).store(panel + j);
            }
        }
    }
};

// What is done with the registers of 16 rows, and with those of the rows that are left. Register numbers are part of the
// instructions, so they are an argument of a macro.
template <bool whole>
struct Registers;

#define I2F_REGISTERS(WHOLE, A, B, X)                                                     \
    template <>                                                                           \
    struct Registers<WHOLE> {                                                             \
        static void start(const float* bias) {                                            \
            _tile_loadd(A, bias, 0); /* into every row */                                 \
            _tile_loadd(B, bias + V::lanes, 0);                                           \
        }                                                                                 \
        static void add(const float* x, std::ptrdiff_t stride, const float* panel) {      \
            _tile_loadd(X, x, 4 * stride);                                                \
            _tile_loadd(6, panel, 8 * V::lanes);                                          \
            _tile_dpbf16ps(A, X, 6);                                                      \
            _tile_loadd(7, panel + V::lanes, 8 * V::lanes);                               \
            _tile_dpbf16ps(B, X, 7);                                                      \
        }                                                                                 \
        static void store(V* a, V* b) {                                                   \
            _tile_stored(A, a, 4 * V::lanes);                                             \
            _tile_stored(B, b, 4 * V::lanes);                                             \
        }                                                                                 \
    }
I2F_REGISTERS(true, 0, 1, 4);
I2F_REGISTERS(false, 2, 3, 5);
#undef I2F_REGISTERS

// `product` of vector.inc in pairs. A row's sums are the same in either registers.
template <int M>
inline void tile_product(const float* x, std::ptrdiff_t stride, std::int64_t words, const float* panel,
                         const float* bias, V (&a)[M], V (&b)[M]) {
    using Tiles = Registers<M == kPairTile>;
    if (M < kPairTile && rows_left != M) lay_out(M);
    written(x);
    Tiles::start(bias);
    std::int64_t k = 0;
    for (; k + V::lanes <= words; k += V::lanes) Tiles::add(x + k, stride, panel + 2 * V::lanes * k);
    if (k < words) {
        const LastWords last(x + k, stride, M, panel + 2 * V::lanes * k, words - k);
        written(&last);
        Tiles::add(last.x, V::lanes, last.panel);
    }
    Tiles::store(a, b);
}

#include "vector.inc"
#include "simd_kernels.inc"
#include "click_kernels.inc"
#include "convolution_kernels.inc"

// A kernel with tile registers at hand. They are given back after it: what others in this thread do with theirs is
// theirs, and a thread that is put aside has less to save.
template <auto kernel>
struct WithTiles;
template <class... Arguments, void (*kernel)(Arguments...)>
struct WithTiles<kernel> {
    static void run(Arguments... arguments) {
        lay_out(kPairTile);
        kernel(arguments...);
        _tile_release();
    }
};

void any_linear(const LinearWeights& weights, const float* x, std::ptrdiff_t x_stride, std::int64_t count, Finish finish,
                float* out, std::ptrdiff_t out_stride) {
    (weights.pairs ? WithTiles<linear>::run : linear)(weights, x, x_stride, count, finish, out, out_stride);
}

}  // namespace

const Kernels kAmx = {
    "amx", "16 rows by 32 bfloat16 a step, x86 with AMX BF16, AVX-512 F, BW, DQ, VL, BF16", L, kPairTile,
    WithTiles<ffn>::run, gates, min_max, find, transition, P, kPairs, any_linear, norm, pack_pixels,
    WithTiles<taps>::run, up_row, WithTiles<attend>::run, WithTiles<bsq>::run, tile_in, tile_out, silu, sigmoid_of};

}  // namespace i2f
