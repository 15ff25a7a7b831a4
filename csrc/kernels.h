// The border between what is compiled once and what is compiled per instruction set: plain structs and function
// pointers. No standard library and no inline code here, so that no object built with AVX flags can lend its copy
// of a shared function to a CPU without AVX.
#pragma once

#include <cstddef>
#include <cstdint>

namespace i2f {

// One feed-forward network g(x) = w3 norm(silu(w1 x + b1) * (w2 x + b2)) + b3, packed for a path of L lanes.
// Rows of w1 and w2 (or of w3) become panels of 2L columns, so that one panel feeds one register tile; short
// panels are filled with zeros. All pointers are 64-byte aligned.
//
// `pairs`: weights are bfloat16, two terms a 32-bit word (the even one in the lower half), so that [d] above becomes
// [ceil(d / 2)]; the rows that they are multiplied with are rounded to bfloat16 too, sums are float32.
struct FfnWeights {
    std::int64_t width;        // d, of x and of the result
    std::int64_t hidden;       // H
    bool pairs;
    const float* w12;          // [ceil(H / L)][d][L of w1, L of w2]
    const float* b12;          // [ceil(H / L)][L of b1, L of b2]
    const float* norm_weight;  // [H rounded up to L]
    const float* norm_bias;    // [H rounded up to L]
    const float* w3;           // [ceil(d / 2L)][H][2L]
    const float* b3;           // [d rounded up to 2L]
};

// The gates of all experts as one linear map, and the gate of the shared network.
struct GateWeights {
    std::int64_t width;    // d
    std::int64_t experts;  // E
    const float* w;        // [ceil(E / 2L)][d][2L]; the last panel is L wide where that is enough
    const float* b;        // [E rounded up to L]
    const float* bias;     // [E rounded up to L], -infinity behind; moves the choice of the expert, never its weight
    const float* shared;   // [d rounded up to L]
    float shared_b;
};

// Up to kMaxRows rows of x and of the result. Row i is at index[i], or at first + i where index is null.
struct Rows {
    const float* x;
    std::ptrdiff_t x_stride;  // floats from row to row
    float* out;
    std::ptrdiff_t out_stride;
    const std::int32_t* index;
    std::int64_t first;
    std::int64_t count;
};

constexpr std::int64_t kMaxRows = 48;
constexpr std::int64_t kMaxExperts = 64;
constexpr float kNormEps = 1e-5F;

// A linear layer for a path of P columns a panel (Kernels::panel).
struct LinearWeights {
    std::int64_t terms;
    std::int64_t outputs;
    std::int64_t chain;  // terms that are added up before the next ones join; not of pairs
    bool pairs;          // as in FfnWeights
    const float* w;  // [ceil(outputs / P)][terms][P]
    const float* b;  // [outputs rounded up to P]
};

enum class Finish { plain, relu, silu, gelu, add };  // add: to what the output held

// Maps to normalise, channel by channel: z [terms, plane], of which `plane` floats are from channel to channel.
struct PanelSource {
    const float* z;
    std::ptrdiff_t plane;
    std::int64_t terms;
    const float* scale;  // [terms]; per pixel: the norm's weight
    const float* shift;  // [terms]; per pixel: the norm's bias
    bool per_pixel;      // normalise each pixel over its channels first
};

// One row of conv3x3(bicubic x2 (z) + edges): sums of rows of the nine products W_tap z, made at low resolution.
struct UpRow {
    const float* rows[3][12];  // for each column of the kernel, the rows that the vertical interpolations add
    float weights[12];
    int count;           // of the 12; fewer at the crop's first and last row
    std::int64_t width;  // low resolution
    const float* edge;   // [2 width], added to the result
    bool silu;
    float* out;          // [2 width]
};

// Keys and values of all tokens, packed; on paths with `pairs` as pairs over a and over N.
struct KeyValues {
    std::int64_t width;  // a
    std::int64_t keys;   // N
    const float* k;      // [ceil(N / P)][a][P]
    const float* v;      // [ceil(a / P)][N][P]
};

// What is known of the keys of every BSQ code.
struct CodeValues {
    std::int64_t width;     // a
    std::int64_t bits;      // 2^bits codes
    LinearWeights book;     // codebook: `bits` columns for bit 1, `bits` for bit 0
    const float* counts;    // [2^bits] keys with that code
    const float* values;    // [ceil(a / P)][2^bits][P] sum of their values; pairs as in KeyValues
};

// A tile of 6 x 6 pixels, of which rows top .. bottom - 1 and columns left .. right - 1 lie on the map; zeros around.
struct TileIn {
    const float* x;      // the first pixel that lies on the map, channel after channel
    std::ptrdiff_t row;  // floats from row to row
    std::int64_t channels;
    int top, bottom, left, right;
    const float *scale, *shift;  // [channels], or null: take silu(scale x + shift) instead of x
    float* out;                  // 36 points [channels]
    std::ptrdiff_t point;        // floats from point to point
};

// A tile of 4 x 4 pixels from its products, or those of them that lie on the map.
struct TileOut {
    const float* products;  // as TileIn::out
    std::ptrdiff_t point;
    std::int64_t channels;
    const float* bias;   // [channels]
    const float* add;    // as out, or null
    bool silu;           // applied at last
    float* out;          // the first pixel
    std::ptrdiff_t row;  // of out and of add
    int rows, columns;
};

constexpr std::int64_t kKeyChunk = 512;   // keys whose scores are held at a time
constexpr std::int64_t kQueryRows = 24;   // queries a call of `attend` or `bsq`
constexpr std::int64_t kPairFloats = 1 << 14;            // of rows that `linear` holds as pairs: 64 KB of stack
constexpr std::int64_t kMaxPairTerms = 2 * kPairFloats;  // of a layer in pairs
constexpr std::int64_t kUpPad = 64;       // floats that up_row may read or write behind a row

// One instruction set. `ffn` and `gates` use `scratch`, 64-byte aligned, of scratch_floats() floats (hmoe.h).
struct Kernels {
    const char* name;
    const char* sentence;
    std::int64_t lanes;  // L
    std::int64_t tile;   // rows of the register tile of `ffn`

    // out = g(x), or out = share[i] * out + (1 - share[i]) * g(x) where share is given.
    void (*ffn)(const FfnWeights& weights, const Rows& rows, const float* share, float* scratch);

    // chosen[i] = argmax_e(sigmoid(gate_e) + bias_e), the first of equals;
    // share[i] = sigmoid(sigmoid(shared gate) - sigmoid(gate of the chosen)).
    void (*gates)(const GateWeights& weights, const Rows& rows, std::int32_t* chosen, float* share, float* scratch);

    // low[j] = min(low[j], row[j]), high[j] = max(high[j], row[j])
    void (*min_max)(const std::uint8_t* row, std::int64_t count, std::uint8_t* low, std::uint8_t* high);

    // found[j] |= row[j] == value
    void (*find)(const std::uint8_t* row, std::int64_t count, std::uint8_t value, std::uint8_t* found);

    // out = the reference mask after a prediction (0 or not); returns the largest state that was met.
    std::uint8_t (*transition)(const std::uint8_t* state, const std::uint8_t* prediction, std::int64_t count,
                               std::uint8_t* out);

    std::int64_t panel;  // P of the functions below
    bool pairs;          // multiplies in bfloat16: weights may be pairs, pixels, keys and values are

    // out[i] = finish(w x[i] + b)
    void (*linear)(const LinearWeights& weights, const float* x, std::ptrdiff_t x_stride, std::int64_t count,
                   Finish finish, float* out, std::ptrdiff_t out_stride);

    // v[i] = norm(v[i]) in place; weight and bias are padded, and rows have room, to a multiple of P.
    void (*norm)(float* v, std::ptrdiff_t stride, std::int64_t count, std::int64_t width, const float* weight,
                 const float* bias);

    // out [terms, P] = normalised pixels first .. first + count - 1 (count <= P) of every channel, zeros behind;
    // [ceil(terms / 2), P] pairs where the path has them.
    void (*pack_pixels)(const PanelSource& source, std::int64_t first, std::int64_t count, float* out);

    // out[i, p P + j] = rows[i] . panel p, column j; rows and panels of pairs where the path has them
    void (*taps)(const float* rows, std::int64_t count, std::int64_t terms, const float* panels, std::int64_t n_panels,
                 float* out, std::ptrdiff_t out_stride);

    // sums: of the result and of its squares. scratch: 3 (width + kUpPad) floats.
    void (*up_row)(const UpRow& row, float* scratch, float* sums);

    // out[i] = softmax(q[i] k) v; scratch of attend_floats(). q is scaled and turned.
    void (*attend)(const KeyValues& keys, const float* q, std::ptrdiff_t q_stride, std::int64_t count, float* out,
                   std::ptrdiff_t out_stride, float* scratch);

    // The same over codes instead of keys; scratch of bsq_floats().
    void (*bsq)(const CodeValues& codes, const float* q, std::ptrdiff_t q_stride, std::int64_t count, float* out,
                std::ptrdiff_t out_stride, float* scratch);

    // See convolution_kernels.inc. sums: of the result and of its squares.
    void (*tile_in)(const TileIn& tile);
    void (*tile_out)(const TileOut& tile, float* sums);

    // v = v sigmoid(v), or sigmoid(v), in place
    void (*silu)(float* v, std::int64_t count);
    void (*sigmoid)(float* v, std::int64_t count);
};

// 32-bit words of a row or column of `terms`.
constexpr std::int64_t words_of(std::int64_t terms, bool pairs) { return pairs ? (terms + 1) / 2 : terms; }
constexpr std::int64_t round_to(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }
constexpr std::int64_t attend_floats(std::int64_t width, std::int64_t panel) {
    return kQueryRows * (kKeyChunk + round_to(width, panel) * 3 + 2);
}
constexpr std::int64_t bsq_floats(std::int64_t width, std::int64_t bits, std::int64_t panel) {
    return kQueryRows * (round_to(std::int64_t{1} << bits, 64) + round_to(2 * bits, panel) + round_to(width, panel)) + 128;
}

extern const Kernels kScalar;
extern const Kernels kPortable;
extern const Kernels kPortableBf16;
#ifdef I2F_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kAmx;
#endif

}  // namespace i2f
