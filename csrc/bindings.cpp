// The border to Python: checks every argument, releases the lock, and nothing else. Wrong types raise TypeError,
// wrong values ValueError, no memory MemoryError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "convolution.h"
#include "decoder.h"
#include "dispatch.h"
#include "encoder_block.h"
#include "evidence.h"
#include "hmoe.h"
#include "outline.h"
#include "random_walk.h"
#include "reference_mask.h"
#include "small_parts.h"
#include "thread_pool.h"
#include "window_attention.h"

namespace py = pybind11;

namespace {

constexpr int kInterface = 11;  // runtime/native.py asks for exactly this
constexpr std::int64_t kMaxSide = 1 << 20;
constexpr std::int64_t kMaxBlockSide = 1 << 14;  // of an encoder block's weights
constexpr int kMaxThreads = 1024;

std::string shape_text(const std::vector<std::int64_t>& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

std::vector<std::int64_t> shape_of(const py::array& array) {
    return {array.shape(), array.shape() + array.ndim()};
}

// An array of exactly this element type and rank, aligned for it.
template <class T>
py::array_t<T> typed(py::handle object, const std::string& name, py::ssize_t rank) {
    const std::string want = py::str(static_cast<py::object>(py::dtype::of<T>()));
    if (!py::isinstance<py::array>(object)) {
        throw py::type_error(name + " must be a numpy array of " + want + ", not " +
                             std::string(py::str(py::type::of(object).attr("__name__"))) + ".");
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (!py::isinstance<py::array_t<T>>(object)) {
        throw py::type_error(name + " must be " + want + ", not " + std::string(py::str(array.dtype())) + ".");
    }
    if (array.ndim() != rank) {
        throw py::value_error(name + " must have " + std::to_string(rank) + " dimensions, not shape " +
                              shape_text(shape_of(array)) + ".");
    }
    if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0) {
        throw py::value_error(name + " must be aligned to its elements.");
    }
    return py::reinterpret_borrow<py::array_t<T>>(object);
}

void require_shape(const py::array& array, const std::string& name, const std::vector<std::int64_t>& want) {
    if (shape_of(array) != want) {
        throw py::value_error(name + " must have shape " + shape_text(want) + ", not " + shape_text(shape_of(array)) +
                              ".");
    }
}

void require_contiguous(const py::array& array, const std::string& name) {
    if ((array.flags() & py::array::c_style) == 0) throw py::value_error(name + " must be contiguous.");
}

// A matrix whose rows are contiguous; returns the distance of rows in elements.
template <class T>
std::ptrdiff_t row_stride(const py::array_t<T>& array, const std::string& name) {
    const auto size = static_cast<py::ssize_t>(sizeof(T));
    if (array.size() == 0) return array.shape(1);
    if ((array.shape(1) > 1 && array.strides(1) != size) || (array.shape(0) > 1 && array.strides(0) % size != 0)) {
        throw py::value_error(name + " must have contiguous rows.");
    }
    return array.shape(0) > 1 ? array.strides(0) / size : array.shape(1);
}

struct Extent {
    std::intptr_t begin, end;
};

Extent extent(const py::array& array) {
    auto begin = reinterpret_cast<std::intptr_t>(array.data());
    std::intptr_t end = begin + array.itemsize();
    for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
        if (array.shape(axis) == 0) return {begin, begin};
        const std::intptr_t reach = (array.shape(axis) - 1) * array.strides(axis);
        (reach < 0 ? begin : end) += reach;
    }
    return {begin, end};
}

void require_apart(const py::array& output, const py::array& input, const std::string& name) {
    const Extent a = extent(output);
    const Extent b = extent(input);
    if (a.begin < b.end && b.begin < a.end) throw py::value_error("out must not overlap " + name + ".");
}

i2f::Precision precision_named(const std::string& name) {
    if (name == "float32") return i2f::Precision::float32;
    if (name == "bfloat16") return i2f::Precision::bfloat16;
    throw py::value_error("Unknown precision '" + name + "'; there are float32 and bfloat16.");
}

const i2f::Kernels& kernels_named(const std::string& isa, const std::string& precision = "float32") {
    const i2f::Precision kind = precision_named(precision);
    const i2f::Kernels* const kernels = i2f::find_kernels(isa, kind);
    if (kernels != nullptr) return *kernels;
    std::string usable = "auto";
    for (const i2f::Path& path : i2f::paths(kind)) {
        if (path.name == isa) throw py::value_error("Instruction set '" + isa + "' cannot run: " + path.reason + ".");
        if (path.reason.empty()) usable += ", " + path.name;
    }
    throw py::value_error("Unknown instruction set '" + isa + "'; here: " + usable + ".");
}

// The weights of a dict that outlives it, which keeps them alive.
i2f::GetWeight weights_of(const py::dict& weights) {
    return [&weights](const std::string& name, const std::vector<std::int64_t>& shape) {
        if (!weights.contains(name)) throw py::value_error("Weight '" + name + "' is missing.");
        const auto array = typed<float>(weights[py::str(name)], name, static_cast<py::ssize_t>(shape.size()));
        require_shape(array, name, shape);
        require_contiguous(array, name);
        return array.data();
    };
}

class HybridExperts {
public:
    HybridExperts(const py::dict& weights, const std::string& isa, const std::string& precision)
        : hmoe_(pack(weights, kernels_named(isa, precision))) {}

    py::array_t<float> forward(const py::object& x_object, const py::object& edge_object,
                               const std::optional<py::object>& out_object) const {
        const py::array_t<float> x = tokens(x_object);
        const py::array_t<bool> edge = typed<bool>(edge_object, "edge", 1);
        require_shape(edge, "edge", {x.shape(0)});
        require_contiguous(edge, "edge");
        const std::ptrdiff_t x_stride = row_stride(x, "x");
        py::array_t<float> out = out_object ? typed<float>(*out_object, "out", 2)
                                            : py::array_t<float>(std::vector<py::ssize_t>{x.shape(0), x.shape(1)});
        std::ptrdiff_t out_stride = x.shape(1);
        if (out_object) {
            require_shape(out, "out", shape_of(x));
            out_stride = row_stride(out, "out");
            if (!out.writeable()) throw py::value_error("out must be writeable.");
            if (std::abs(out_stride) < out.shape(1)) throw py::value_error("out must not overlap itself.");
            require_apart(out, x, "x");
            require_apart(out, edge, "edge");
        }
        const float* const from = x.data();
        const auto* const flags = reinterpret_cast<const std::uint8_t*>(edge.data());
        float* const to = out.mutable_data();
        const std::int64_t count = x.shape(0);
        {
            const py::gil_scoped_release unlocked;
            hmoe_.forward(from, x_stride, flags, count, to, out_stride);
        }
        return out;
    }

    std::tuple<py::array_t<std::int32_t>, py::array_t<float>> route(const py::object& x_object) const {
        const py::array_t<float> x = tokens(x_object);
        const std::ptrdiff_t x_stride = row_stride(x, "x");
        py::array_t<std::int32_t> chosen(x.shape(0));
        py::array_t<float> share(x.shape(0));
        const float* const from = x.data();
        std::int32_t* const experts = chosen.mutable_data();
        float* const shares = share.mutable_data();
        const std::int64_t count = x.shape(0);
        {
            const py::gil_scoped_release unlocked;
            hmoe_.route(from, x_stride, count, experts, shares);
        }
        return {chosen, share};
    }

    std::string isa() const { return hmoe_.kernels().name; }
    std::size_t nbytes() const { return hmoe_.bytes(); }

    static i2f::Hmoe pack(const py::dict& weights, const i2f::Kernels& kernels);

private:
    py::array_t<float> tokens(const py::object& object) const {
        py::array_t<float> x = typed<float>(object, "x", 2);
        if (x.shape(0) > std::numeric_limits<std::int32_t>::max()) throw py::value_error("x has too many rows.");
        require_shape(x, "x", {x.shape(0), hmoe_.width()});
        return x;
    }

    i2f::Hmoe hmoe_;
};

i2f::Hmoe HybridExperts::pack(const py::dict& weights, const i2f::Kernels& kernels) {
    std::vector<py::array_t<float>> alive;
    std::vector<std::string> known;
    const auto get = [&](const char* name, py::ssize_t rank) {
        if (!weights.contains(name)) throw py::value_error(std::string("Weight '") + name + "' is missing.");
        known.emplace_back(name);
        alive.push_back(typed<float>(weights[name], name, rank));
        require_contiguous(alive.back(), name);
        return alive.back();
    };
    const py::array_t<float> w1 = get("w1", 3);
    const std::int64_t experts = w1.shape(0);
    const std::int64_t hidden = w1.shape(1);
    const std::int64_t width = w1.shape(2);
    if (experts < 1 || experts > i2f::kMaxExperts) {
        throw py::value_error("w1 must hold 1 to 64 experts, not " + std::to_string(experts) + ".");
    }
    if (hidden < 1 || hidden > kMaxSide || width < 1 || width > kMaxSide) {
        throw py::value_error("w1 must have shape [experts, hidden, width], not " + shape_text(shape_of(w1)) + ".");
    }
    const auto data = [&](const char* name, const std::vector<std::int64_t>& shape) {
        const py::array_t<float> array = get(name, static_cast<py::ssize_t>(shape.size()));
        require_shape(array, name, shape);
        return array.data();
    };
    i2f::HmoeSource source{};
    source.width = width;
    source.hidden = hidden;
    source.experts = experts;
    source.shared = {data("shared_w1.weight", {hidden, width}), data("shared_w1.bias", {hidden}),
                     data("shared_w2.weight", {hidden, width}), data("shared_w2.bias", {hidden}),
                     data("shared_w3.weight", {width, hidden}), data("shared_w3.bias", {width})};
    source.shared_norm_weight = data("shared_norm.weight", {hidden});
    source.shared_norm_bias = data("shared_norm.bias", {hidden});
    source.routed = {w1.data(),
                     data("b1", {experts, hidden}),
                     data("w2", {experts, hidden, width}),
                     data("b2", {experts, hidden}),
                     data("w3", {experts, width, hidden}),
                     data("b3", {experts, width})};
    source.norm_weight = data("norm.weight", {hidden});
    source.norm_bias = data("norm.bias", {hidden});
    source.shared_gate_weight = data("shared_gate.weight", {1, width});
    source.shared_gate_bias = data("shared_gate.bias", {1});
    source.expert_gate_weight = data("expert_gate.weight", {experts, width});
    source.expert_gate_bias = data("expert_gate.bias", {experts});
    source.expert_bias = data("expert_bias", {experts});
    if (weights.size() != known.size()) throw py::value_error("weights holds names that are not known.");
    return {source, kernels};
}

class Decoder {
public:
    Decoder(const py::dict& weights, const py::dict& sizes, const std::string& isa, const std::string& precision)
        : decoder_(make(weights, sizes, kernels_named(isa, precision))) {}

    // -> logits inside the box, box in tokens, low logits
    py::tuple decode(const py::object& tokens_object, const py::list& edges, const py::list& units, const py::list& middles,
                     const py::object& cosines_object, const py::object& sines_object, const py::object& state_object,
                     const std::optional<std::array<std::int64_t, 4>>& forced) const {
        const i2f::DecoderSizes& sizes = decoder_->sizes();
        const auto tokens = typed<float>(tokens_object, "tokens", 3);
        const std::int64_t rows = tokens.shape(0);
        const std::int64_t columns = tokens.shape(1);
        require_shape(tokens, "tokens", {rows, columns, sizes.width});
        require_contiguous(tokens, "tokens");
        if (rows < 1 || columns < 1 || rows > kMaxTokens || columns > kMaxTokens) {
            throw py::value_error("tokens must have 1 to 4096 rows and columns, not shape " +
                                  shape_text(shape_of(tokens)) + ".");
        }
        i2f::EncodedImage image{};
        image.rows = rows;
        image.columns = columns;
        image.tokens = tokens.data();
        if (edges.size() != 4 || units.size() != 4 || middles.size() != 4) {
            throw py::value_error("edges, units and middles must hold 4 arrays each.");
        }
        std::vector<py::array> alive;
        for (std::size_t j = 0; j < 4; ++j) {
            const std::string name = "edges[" + std::to_string(j) + "]";
            const std::string units_name = "units[" + std::to_string(j) + "]";
            const std::int64_t outputs = j < 3 ? sizes.up[j + 1] : 1;
            const std::int64_t size = i2f::edge_map_size(outputs, rows, columns, static_cast<int>(j));
            i2f::EdgeMaps& maps = image.edges[j];
            if (py::isinstance<py::array_t<std::int16_t>>(edges[j])) {
                const auto array = typed<std::int16_t>(edges[j], name, 1);
                const auto unit = typed<std::uint16_t>(units[j], units_name, 1);
                require_shape(unit, units_name, {i2f::blocks_of(size, i2f::kEdgeBlock)});
                require_contiguous(unit, units_name);
                const std::string middles_name = "middles[" + std::to_string(j) + "]";
                const auto middle = typed<float>(middles[j], middles_name, 2);
                require_shape(middle, middles_name, {9, outputs});
                require_contiguous(middle, middles_name);
                maps.middles = middle.data();
                alive.push_back(middle);
                maps.packed = array.data();
                maps.units = unit.data();
                alive.push_back(unit);
                alive.push_back(array);
            } else {
                const auto array = typed<float>(edges[j], name, 1);
                maps.exact = array.data();
                alive.push_back(array);
            }
            require_shape(alive.back(), name, {size});
            require_contiguous(alive.back(), name);
        }
        const auto cosines = typed<float>(cosines_object, "cosines", 2);
        const auto sines = typed<float>(sines_object, "sines", 2);
        require_shape(cosines, "cosines", {rows * columns, sizes.attention / 2});
        require_shape(sines, "sines", {rows * columns, sizes.attention / 2});
        require_contiguous(cosines, "cosines");
        require_contiguous(sines, "sines");
        image.cosines = cosines.data();
        image.sines = sines.data();
        const auto state = typed<std::uint8_t>(state_object, "state", 2);
        require_shape(state, "state", {16 * rows, 16 * columns});
        const std::ptrdiff_t stride = row_stride(state, "state");
        const std::uint8_t* const states = state.data();

        py::array_t<float> low(std::vector<py::ssize_t>{rows, columns});
        float* const low_data = low.mutable_data();
        static thread_local i2f::Arena arena;
        i2f::TokenBox box{};
        bool known = true;
        float* x = nullptr;
        {
            const py::gil_scoped_release unlocked;
            i2f::Box told{};
            known = i2f::prompt_box(decoder_->kernels(), states, stride, 16 * rows, 16 * columns, told);
            if (known) {
                x = reinterpret_cast<float*>(
                    arena.get(static_cast<std::size_t>(rows * columns * sizes.width) * sizeof(float)));
                box = decoder_->locate(image, states, stride, told, low_data, x);
            }
        }
        if (!known) throw py::value_error("state holds a value above 4; states are 0 to 4.");
        if (forced) {
            const auto [left, top, right, bottom] = *forced;
            if (left < 0 || top < 0 || right > columns || bottom > rows || left >= right || top >= bottom) {
                throw py::value_error("box " + shape_text({left, top, right, bottom}) +
                                      " must be left, top, right, bottom in tokens.");
            }
            box = {left, top, right, bottom};
        }
        py::array_t<float> logits(std::vector<py::ssize_t>{16 * (box.bottom - box.top), 16 * (box.right - box.left)});
        float* const to = logits.mutable_data();
        {
            const py::gil_scoped_release unlocked;
            decoder_->draw(image, x, box, to);
        }
        return py::make_tuple(logits, py::make_tuple(box.left, box.top, box.right, box.bottom), low);
    }

    std::string isa() const { return decoder_->kernels().name; }
    std::size_t nbytes() const { return decoder_->bytes(); }

private:
    static constexpr std::int64_t kMaxTokens = 4096;

    static std::unique_ptr<i2f::Decoder> make(const py::dict& weights, const py::dict& sizes,
                                              const i2f::Kernels& kernels) {
        const auto number = [&](const char* name, std::int64_t low, std::int64_t high) {
            if (!sizes.contains(name)) throw py::value_error(std::string("Size '") + name + "' is missing.");
            const auto value = sizes[name].cast<std::int64_t>();
            if (value < low || value > high) {
                throw py::value_error(std::string(name) + " must be " + std::to_string(low) + " to " +
                                      std::to_string(high) + ", not " + std::to_string(value) + ".");
            }
            return value;
        };
        i2f::DecoderSizes s{};
        s.width = number("embed_dim", 1, kMaxSide);
        s.attention = number("attention_dim", 2, kMaxSide);
        if (s.attention % 2 != 0) throw py::value_error("attention_dim must be even.");
        s.bits = number("code_bits", 1, 12);
        s.blocks = number("decoder_blocks", 1, 64);
        for (int j = 0; j < 3; ++j) s.prompt[j] = number(("prompt_" + std::to_string(j)).c_str(), 1, kMaxSide);
        s.up[0] = s.width;
        for (int j = 1; j < 4; ++j) s.up[j] = number(("up_" + std::to_string(j)).c_str(), 1, kMaxSide);
        for (const std::int64_t width : {s.width, 9 * s.prompt[0], 9 * s.prompt[1], 9 * s.prompt[2]}) {
            if (kernels.pairs && width > i2f::kMaxPairTerms) {
                throw py::value_error("A layer of " + std::to_string(width) + " terms is too wide for bfloat16.");
            }
        }
        s.per_pixel_norm = number("per_pixel_norm", 0, 1) == 1;
        s.constant_is_edge = number("constant_is_edge", 0, 1) == 1;
        s.low_threshold = sizes["low_threshold"].cast<float>();
        std::vector<i2f::Hmoe> experts;
        for (std::int64_t i = 0; i < s.blocks; ++i) {
            const std::string prefix = "blocks." + std::to_string(i) + ".experts.";
            py::dict part;
            for (const auto& item : weights) {
                const auto name = item.first.cast<std::string>();
                if (name.compare(0, prefix.size(), prefix) == 0) part[py::str(name.substr(prefix.size()))] = item.second;
            }
            experts.push_back(HybridExperts::pack(part, kernels));
            if (experts.back().width() != s.width) throw py::value_error("The experts are not embed_dim wide.");
        }
        return std::make_unique<i2f::Decoder>(weights_of(weights), s, std::move(experts), kernels);
    }

    std::unique_ptr<i2f::Decoder> decoder_;
};

py::array_t<bool> edge_tokens(const py::object& reference_object, const std::array<std::int64_t, 4>& box,
                              bool constant_is_edge, std::int64_t patch, const std::string& isa) {
    const i2f::Kernels& kernels = kernels_named(isa);
    const py::array_t<std::uint8_t> reference = typed<std::uint8_t>(reference_object, "reference", 2);
    const std::ptrdiff_t stride = row_stride(reference, "reference");
    const std::int64_t height = reference.shape(0);
    const std::int64_t width = reference.shape(1);
    if (patch < 1 || height % patch != 0 || width % patch != 0) {
        throw py::value_error("patch must divide the shape of reference, " + shape_text(shape_of(reference)) + ".");
    }
    const auto [left, top, right, bottom] = box;
    if (left < 0 || top < 0 || right > width || bottom > height || left >= right || top >= bottom) {
        throw py::value_error("box " + shape_text({left, top, right, bottom}) +
                              " must be left, top, right, bottom with an area inside reference, " +
                              shape_text(shape_of(reference)) + ".");
    }
    py::array_t<bool> edge(std::vector<py::ssize_t>{height / patch, width / patch});
    const std::uint8_t* const from = reference.data();
    auto* const to = reinterpret_cast<std::uint8_t*>(edge.mutable_data());
    {
        const py::gil_scoped_release unlocked;
        i2f::edge_tokens(kernels, from, stride, height, width, {left, top, right, bottom}, constant_is_edge, patch, to);
    }
    return edge;
}

py::array_t<std::uint8_t> apply_prediction(const py::object& state_object, const py::object& prediction_object,
                                           const std::string& isa) {
    const i2f::Kernels& kernels = kernels_named(isa);
    const py::array_t<std::uint8_t> state = typed<std::uint8_t>(state_object, "state", 2);
    const py::array_t<bool> prediction = typed<bool>(prediction_object, "prediction", 2);
    require_contiguous(state, "state");
    require_contiguous(prediction, "prediction");
    require_shape(prediction, "prediction", shape_of(state));
    py::array_t<std::uint8_t> out(std::vector<py::ssize_t>{state.shape(0), state.shape(1)});
    const std::uint8_t* const from = state.data();
    const auto* const flags = reinterpret_cast<const std::uint8_t*>(prediction.data());
    std::uint8_t* const to = out.mutable_data();
    const std::int64_t count = state.size();
    std::uint8_t largest = 0;
    {
        const py::gil_scoped_release unlocked;
        largest = kernels.transition(from, flags, count, to);
    }
    if (largest > 4) throw py::value_error("state holds " + std::to_string(largest) + "; states are 0 to 4.");
    return out;
}

py::array_t<float> random_walk(const py::object& links_object, const py::object& inside_object,
                               const std::array<std::int64_t, 4>& box, const py::object& state_object, float trust,
                               float softness, float sure, float nearly, std::int64_t iterations) {
    const auto links = typed<float>(links_object, "links", 2);
    require_shape(links, "links", {4, i2f::kGrid});
    require_contiguous(links, "links");
    const auto state = typed<std::uint8_t>(state_object, "state", 2);
    const std::int64_t size = state.shape(0);
    if (size < i2f::kCells || size > kMaxSide || size % i2f::kCells != 0 || state.shape(1) != size) {
        throw py::value_error("state must be a square whose side is a multiple of " + std::to_string(i2f::kCells) +
                              ", not of shape " + shape_text(shape_of(state)) + ".");
    }
    const std::ptrdiff_t stride = row_stride(state, "state");
    const auto [left, top, right, bottom] = box;
    if (left < 0 || top < 0 || 16 * right > size || 16 * bottom > size || left >= right || top >= bottom) {
        throw py::value_error("box " + shape_text({left, top, right, bottom}) +
                              " must be left, top, right, bottom in tokens.");
    }
    const auto inside = typed<float>(inside_object, "inside", 2);
    require_shape(inside, "inside", {16 * (bottom - top), 16 * (right - left)});
    require_contiguous(inside, "inside");
    if (!(trust > 0) || !(softness >= 1) || !(sure > 0) || !(nearly > 0 && nearly < 0.5F) || iterations < 0) {
        throw py::value_error("trust, softness, sure, nearly or iterations is out of range.");
    }
    py::array_t<float> out(std::vector<py::ssize_t>{inside.shape(0), inside.shape(1)});
    const float *const free = links.data(), *const logits = inside.data();
    const std::uint8_t* const states = state.data();
    float* const to = out.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        i2f::random_walk(free, logits, {left, top, right, bottom}, states, stride, size,
                         {trust, softness, sure, nearly, iterations}, to);
    }
    return out;
}

// None where every part stays.
std::optional<py::array_t<float>> flip_small_parts(const py::object& logits_object, const py::object& spoken_object,
                                                   double share, bool inside, float least) {
    const auto logits = typed<float>(logits_object, "logits", 2);
    require_contiguous(logits, "logits");
    const std::int64_t rows = logits.shape(0);
    const std::int64_t columns = logits.shape(1);
    if (rows > kMaxSide || columns > kMaxSide || rows * columns > std::numeric_limits<std::int32_t>::max()) {
        throw py::value_error("logits must have fewer pixels than " + shape_text(shape_of(logits)) + ".");
    }
    const auto spoken = typed<bool>(spoken_object, "spoken", 2);
    require_shape(spoken, "spoken", {rows, columns});
    const std::ptrdiff_t stride = row_stride(spoken, "spoken");
    if (!(share >= 0) || !(least > 0)) throw py::value_error("share or least is out of range.");
    py::array_t<float> out(std::vector<py::ssize_t>{logits.shape(0), logits.shape(1)});
    const float* const from = logits.data();
    const auto* const said = reinterpret_cast<const std::uint8_t*>(spoken.data());
    float* const to = out.mutable_data();
    bool any = false;
    {
        const py::gil_scoped_release unlocked;
        any = i2f::flip_small_parts(from, rows, columns, said, stride, {inside, share, least}, to);
    }
    if (!any) return std::nullopt;
    return out;
}

// -> numbers [levels, 10], or [levels, 16] with links; which levels hold anything. Clicks: row, column, 1 or 0.
py::tuple describe(const py::object& logits_object, const py::object& clicks_object,
                   const std::optional<py::object>& previous_object, const std::vector<float>& levels,
                   const std::optional<py::object>& links_object) {
    const auto logits = typed<float>(logits_object, "logits", 2);
    require_contiguous(logits, "logits");
    const std::int64_t rows = logits.shape(0), columns = logits.shape(1);
    const std::int64_t most = links_object ? i2f::kCells : 1024;
    if (rows < 1 || columns < 1 || rows > most || columns > most) {
        throw py::value_error("logits must have 1 to " + std::to_string(most) + " rows and columns, not shape " +
                              shape_text(shape_of(logits)) + ".");
    }
    if (levels.empty() || levels.size() > i2f::kMaxLevels ||
        std::adjacent_find(levels.begin(), levels.end(), [](float a, float b) { return !(a < b); }) != levels.end()) {
        throw py::value_error("levels must be 1 to " + std::to_string(i2f::kMaxLevels) + " rising numbers.");
    }
    const auto told = typed<std::int64_t>(clicks_object, "clicks", 2);
    require_shape(told, "clicks", {told.shape(0), 3});
    require_contiguous(told, "clicks");
    std::vector<i2f::SeenClick> clicks;
    for (py::ssize_t n = 0; n < told.shape(0); ++n) {
        const std::int64_t row = told.at(n, 0), column = told.at(n, 1);
        if (row < 0 || row >= rows || column < 0 || column >= columns) {
            throw py::value_error("clicks must lie in logits.");
        }
        clicks.push_back({row, column, told.at(n, 2) != 0});
    }
    i2f::Seen seen{logits.data(), rows, columns, clicks.data(), told.shape(0), nullptr, nullptr};
    std::optional<py::array_t<bool>> previous;
    if (previous_object) {
        previous = typed<bool>(*previous_object, "previous", 2);
        require_shape(*previous, "previous", {rows, columns});
        require_contiguous(*previous, "previous");
        seen.previous = reinterpret_cast<const std::uint8_t*>(previous->data());
    }
    std::optional<py::array_t<float>> links;
    if (links_object) {
        links = typed<float>(*links_object, "links", 2);
        require_shape(*links, "links", {4, i2f::kGrid});
        require_contiguous(*links, "links");
        seen.links = links->data();
    }
    const auto count = static_cast<py::ssize_t>(levels.size());
    py::array_t<double> numbers(std::vector<py::ssize_t>{count, i2f::kEvidence + (links ? i2f::kShape : 0)});
    py::array_t<bool> found(count);
    double* const to = numbers.mutable_data();
    bool* const flags = found.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        std::fill_n(to, numbers.size(), 0.0);
        i2f::describe(seen, levels.data(), static_cast<int>(count), flags, to);
    }
    return py::make_tuple(numbers, found);
}

// Of a 3 x 3 convolution: weight [out, in, 3, 3] and bias [out].
struct ConvolutionWeights {
    py::array_t<float> weight, bias;
    std::int64_t in, out;

    ConvolutionWeights(const py::object& weight_object, const py::object& bias_object)
        : weight(typed<float>(weight_object, "weight", 4)),
          bias(typed<float>(bias_object, "bias", 1)),
          in(weight.shape(1)),
          out(weight.shape(0)) {
        if (out < 1 || in < 1 || out > kMaxSide || in > kMaxSide) {
            throw py::value_error("weight must have shape [out, in, 3, 3], not " + shape_text(shape_of(weight)) + ".");
        }
        require_shape(weight, "weight", {out, in, 3, 3});
        require_contiguous(weight, "weight");
        require_shape(bias, "bias", {out});
        require_contiguous(bias, "bias");
    }
};

class Convolution {
public:
    Convolution(const py::object& weight, const py::object& bias, const std::string& isa)
        : convolution_(make(weight, bias, kernels_named(isa))) {}

    // -> result, its sum, the sum of its squares
    std::tuple<py::array_t<float>, double, double> forward(const py::object& x_object,
                                                           const std::optional<py::object>& scale,
                                                           const std::optional<py::object>& shift,
                                                           const std::optional<py::object>& add, bool silu) const {
        const auto x = typed<float>(x_object, "x", 3);
        require_shape(x, "x", {x.shape(0), x.shape(1), convolution_->inputs()});
        require_contiguous(x, "x");
        if (x.shape(0) > kMaxSide || x.shape(1) > kMaxSide) throw py::value_error("x has too many pixels.");
        if (scale.has_value() != shift.has_value()) throw py::value_error("scale and shift go together.");
        const auto given = [](const std::optional<py::object>& object, const char* name,
                              const std::vector<std::int64_t>& shape) {
            const auto array = typed<float>(*object, name, static_cast<py::ssize_t>(shape.size()));
            require_shape(array, name, shape);
            require_contiguous(array, name);
            return array;
        };
        std::vector<py::array_t<float>> alive;
        const auto data = [&](const std::optional<py::object>& object, const char* name,
                              const std::vector<std::int64_t>& shape) -> const float* {
            if (!object) return nullptr;
            alive.push_back(given(object, name, shape));
            return alive.back().data();
        };
        py::array_t<float> out(std::vector<py::ssize_t>{x.shape(0), x.shape(1), convolution_->outputs()});
        const i2f::ConvolutionCall call{x.data(),
                                        x.shape(0),
                                        x.shape(1),
                                        data(scale, "scale", {convolution_->inputs()}),
                                        data(shift, "shift", {convolution_->inputs()}),
                                        data(add, "add", shape_of(out)),
                                        silu,
                                        out.mutable_data()};
        double sums[2] = {};
        {
            const py::gil_scoped_release unlocked;
            convolution_->run(call, sums);
        }
        return {out, sums[0], sums[1]};
    }

    std::string isa() const { return convolution_->kernels().name; }
    std::size_t nbytes() const { return convolution_->bytes(); }

private:
    static std::unique_ptr<i2f::Convolution> make(const py::object& weight, const py::object& bias,
                                                  const i2f::Kernels& kernels) {
        const ConvolutionWeights given(weight, bias);
        return std::make_unique<i2f::Convolution>(given.in, given.out, given.weight.data(), given.bias.data(), kernels);
    }

    std::unique_ptr<i2f::Convolution> convolution_;
};

class EncoderBlock {
public:
    // weights: as the state dict of nn/encoder.py's Block names them
    EncoderBlock(const py::dict& weights, const std::string& isa, const std::string& precision)
        : block_(make(weights, kernels_named(isa, precision))) {}

    // x [rows, C] -> [rows, 3 C]
    py::array_t<float> project(const py::object& x_object) const {
        const auto x = rows_of(x_object, "x");
        py::array_t<float> qkv(std::vector<py::ssize_t>{x.shape(0), 3 * x.shape(1)});
        float* const out = qkv.mutable_data();
        {
            const py::gil_scoped_release unlocked;
            block_->project(x.data(), x.shape(0), out);
        }
        return qkv;
    }

    // x, attended [rows, C]; x is changed
    void finish(const py::object& x_object, const py::object& attended_object) const {
        auto x = rows_of(x_object, "x");
        const auto attended = rows_of(attended_object, "attended");
        require_shape(attended, "attended", shape_of(x));
        if (!x.writeable()) throw py::value_error("x is read-only.");
        float* const out = x.mutable_data();
        {
            const py::gil_scoped_release unlocked;
            block_->finish(out, attended.data(), x.shape(0));
        }
    }

    std::string isa() const { return block_->kernels().name; }
    std::size_t nbytes() const { return block_->bytes(); }

private:
    py::array_t<float> rows_of(const py::object& object, const char* name) const {
        const auto rows = typed<float>(object, name, 2);
        require_shape(rows, name, {rows.shape(0), block_->width()});
        require_contiguous(rows, name);
        return rows;
    }

    static std::unique_ptr<i2f::EncoderBlock> make(const py::dict& weights, const i2f::Kernels& kernels) {
        const char* const sides = "fc1.weight";  // [hidden, C]
        if (!weights.contains(sides)) throw py::value_error(std::string("Weight '") + sides + "' is missing.");
        const auto fc1 = typed<float>(weights[sides], sides, 2);
        const std::int64_t hidden = fc1.shape(0);
        const std::int64_t width = fc1.shape(1);
        if (hidden < 1 || hidden > kMaxBlockSide || width < 1 || width > kMaxBlockSide) {
            throw py::value_error("Sides of fc1.weight must be in 1.." + std::to_string(kMaxBlockSide) + ", not " +
                                  shape_text(shape_of(fc1)) + ".");
        }
        return std::make_unique<i2f::EncoderBlock>(width, hidden, weights_of(weights), kernels);
    }

    std::unique_ptr<i2f::EncoderBlock> block_;
};

class WindowAttention {
public:
    // cosines, sines [side * side, a / 2]
    WindowAttention(std::int64_t side, std::int64_t heads, const py::object& cosines_object, const py::object& sines_object,
                    const std::string& isa, const std::string& precision) {
        const auto cosines = typed<float>(cosines_object, "cosines", 2);
        const auto sines = typed<float>(sines_object, "sines", 2);
        const std::int64_t half = cosines.shape(1);
        if (side < 1 || side > 256 || heads < 1 || heads > 256 || half < 1 || half > 512) {
            throw py::value_error("side and heads must be in 1..256, the second side of cosines in 1..512.");
        }
        for (const auto& [array, name] : {std::pair{cosines, "cosines"}, std::pair{sines, "sines"}}) {
            require_shape(array, name, {side * side, half});
            require_contiguous(array, name);
        }
        attention_ = std::make_unique<i2f::WindowAttention>(side, heads, 2 * half, cosines.data(), sines.data(),
                                                            kernels_named(isa, precision));
    }

    // qkv [height * width, 3 heads a], padding [3 heads a] -> [height * width, heads a]
    py::array_t<float> forward(const py::object& qkv_object, const py::object& padding_object,
                               std::pair<std::int64_t, std::int64_t> shape, std::int64_t lead) const {
        const auto [height, width] = shape;
        const std::int64_t channels = attention_->heads() * attention_->head_width();
        if (height < 1 || width < 1 || height > kMaxSide || width > kMaxSide) {
            throw py::value_error("height and width must be in 1.." + std::to_string(kMaxSide) + ".");
        }
        if (lead < 0 || lead >= attention_->side()) throw py::value_error("lead must be less than a window's side.");
        const auto qkv = typed<float>(qkv_object, "qkv", 2);
        require_shape(qkv, "qkv", {height * width, 3 * channels});
        require_contiguous(qkv, "qkv");
        const auto padding = typed<float>(padding_object, "padding", 1);
        require_shape(padding, "padding", {3 * channels});
        require_contiguous(padding, "padding");
        py::array_t<float> out(std::vector<py::ssize_t>{qkv.shape(0), static_cast<py::ssize_t>(channels)});
        const i2f::WindowCall call{qkv.data(), padding.data(), height, width, lead, out.mutable_data()};
        {
            const py::gil_scoped_release unlocked;
            attention_->run(call);
        }
        return out;
    }

    std::string isa() const { return attention_->kernels().name; }
    std::size_t nbytes() const { return attention_->bytes(); }

private:
    std::unique_ptr<i2f::WindowAttention> attention_;
};

class Outline {
public:
    // layers: weight and bias of each convolution, in the order of csrc/outline.h
    Outline(const std::vector<std::pair<py::object, py::object>>& layers, const std::vector<int>& down,
            const std::vector<int>& up, const std::string& isa) {
        std::vector<ConvolutionWeights> alive;
        std::vector<i2f::OutlineLayer> given;
        for (const auto& [weight, bias] : layers) {
            const ConvolutionWeights& layer = alive.emplace_back(weight, bias);
            given.push_back({layer.in, layer.out, layer.weight.data(), layer.bias.data()});
        }
        outline_ = std::make_unique<i2f::Outline>(given, down, up, kernels_named(isa));
    }

    // -> what is to be added to the logits
    py::array_t<float> forward(const py::object& x_object) const {
        const auto x = typed<float>(x_object, "x", 3);
        require_shape(x, "x", {outline_->channels(), x.shape(1), x.shape(2)});
        require_contiguous(x, "x");
        const std::int64_t side = outline_->side();
        for (const py::ssize_t length : {x.shape(1), x.shape(2)}) {
            if (length < 1 || length > kMaxSide || length % side != 0) {
                throw py::value_error("Sides of x must be multiples of " + std::to_string(side) + ", not " +
                                      shape_text(shape_of(x)) + ".");
            }
        }
        py::array_t<float> out(std::vector<py::ssize_t>{x.shape(1), x.shape(2)});
        float* const to = out.mutable_data();
        {
            const py::gil_scoped_release unlocked;
            outline_->run(x.data(), x.shape(1), x.shape(2), to);
        }
        return out;
    }

    // logits, before [H, W], picture [.., .., 3]; clicks [n, 3]; rules in the order of i2f::ViewRules
    // -> the logits with what is to be added to them, and whether that is finite
    std::pair<py::array_t<float>, bool> draw(const py::object& logits_object, const std::optional<py::object>& before_object,
                                             const py::object& picture_object, std::pair<std::int64_t, std::int64_t> shape,
                                             std::pair<std::int64_t, std::int64_t> shown, const py::object& clicks_object,
                                             float sure, float scale, double blob, double far,
                                             const std::array<float, 3>& mean, const std::array<float, 3>& deviation) const {
        const i2f::ViewRules rules{sure, scale, blob, far, {mean[0], mean[1], mean[2]},
                                   {deviation[0], deviation[1], deviation[2]}};
        const auto logits = typed<float>(logits_object, "logits", 2);
        require_contiguous(logits, "logits");
        std::optional<py::array_t<float>> before;
        if (before_object) {
            before = typed<float>(*before_object, "before", 2);
            require_shape(*before, "before", shape_of(logits));
            require_contiguous(*before, "before");
        }
        const auto picture = typed<std::uint8_t>(picture_object, "picture", 3);
        require_shape(picture, "picture", {picture.shape(0), picture.shape(1), 3});
        if (picture.size() > 0 && (picture.strides(2) != 1 || picture.strides(1) != 3)) {
            throw py::value_error("The colours of a row of picture must be next to one another.");
        }
        const auto clicks = typed<float>(clicks_object, "clicks", 2);
        require_shape(clicks, "clicks", {clicks.shape(0), 3});
        require_contiguous(clicks, "clicks");
        const auto [height, width] = shape;
        if (i2f::kViewChannels != outline_->channels()) throw py::value_error("The network looks at something else.");
        const auto fits = [&](std::int64_t side, std::int64_t part) {
            return side >= 1 && side <= kMaxSide && side % outline_->side() == 0 && part >= 1 && part <= side;
        };
        if (logits.size() == 0 || !fits(height, shown.first) || !fits(width, shown.second)) {
            throw py::value_error("No such view of logits " + shape_text(shape_of(logits)) + ": " +
                                  shape_text({height, width}) + ", shown " + shape_text({shown.first, shown.second}) + ".");
        }
        for (py::ssize_t n = 0; n < clicks.size(); ++n) {
            if (!std::isfinite(clicks.data()[n])) throw py::value_error("clicks must be finite.");
        }
        const i2f::View view{logits.data(), before ? before->data() : nullptr, logits.shape(0), logits.shape(1),
                             picture.data(), picture.shape(0), picture.shape(1), picture.strides(0),
                             height, width, shown.first, shown.second, clicks.data(), clicks.shape(0)};
        py::array_t<float> out(shape_of(logits));
        float* const to = out.mutable_data();
        bool finite = false;
        {
            const py::gil_scoped_release unlocked;
            finite = outline_->draw(view, rules, to);
        }
        return {out, finite};
    }

    std::string isa() const { return outline_->kernels().name; }
    std::size_t nbytes() const { return outline_->bytes(); }

private:
    std::unique_ptr<i2f::Outline> outline_;
};

std::vector<std::tuple<std::string, std::string, std::string>> instruction_sets(const std::string& precision) {
    std::vector<std::tuple<std::string, std::string, std::string>> rows;
    for (const i2f::Path& path : i2f::paths(precision_named(precision))) {
        rows.emplace_back(path.name, path.kernels != nullptr ? path.kernels->sentence : "", path.reason);
    }
    return rows;
}

void set_threads(int count) {
    if (count < 1 || count > kMaxThreads) {
        throw py::value_error("threads must be 1 to 1024, not " + std::to_string(count) + ".");
    }
    i2f::set_threads(count);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
    m.doc() = "Compiled kernels of Inter2Former; used through inter2former.runtime.native.";
    m.attr("INTERFACE") = kInterface;
    m.def("instruction_sets", &instruction_sets, py::arg("precision") = "float32");
    m.def("bfloat16_pays", &i2f::bfloat16_pays);
    m.def("threads", &i2f::threads);
    m.def("set_threads", &set_threads, py::arg("count"));
    m.def("limit_threads", &i2f::limit_threads, py::arg("count"));
    m.def("edge_tokens", &edge_tokens, py::arg("reference"), py::arg("box"), py::arg("constant_is_edge") = false,
          py::arg("patch") = 16, py::arg("isa") = "auto");
    m.def("apply_prediction", &apply_prediction, py::arg("state"), py::arg("prediction"), py::arg("isa") = "auto");
    m.def("flip_small_parts", &flip_small_parts, py::arg("logits"), py::arg("spoken"), py::arg("share"),
          py::arg("inside"), py::arg("least"));
    m.def("describe", &describe, py::arg("logits"), py::arg("clicks"), py::arg("previous"), py::arg("levels"),
          py::arg("links"));
    m.def("random_walk", &random_walk, py::arg("links"), py::arg("inside"), py::arg("box"), py::arg("state"),
          py::arg("trust"), py::arg("softness"), py::arg("sure"), py::arg("nearly"), py::arg("iterations"));
    py::class_<HybridExperts>(m, "HybridExperts")
        .def(py::init<const py::dict&, const std::string&, const std::string&>(), py::arg("weights"),
             py::arg("isa") = "auto", py::arg("precision") = "float32")
        .def("forward", &HybridExperts::forward, py::arg("x"), py::arg("edge"), py::arg("out") = py::none())
        .def("route", &HybridExperts::route, py::arg("x"))
        .def_property_readonly("isa", &HybridExperts::isa)
        .def_property_readonly("nbytes", &HybridExperts::nbytes);
    py::class_<Decoder>(m, "Decoder")
        .def(py::init<const py::dict&, const py::dict&, const std::string&, const std::string&>(), py::arg("weights"),
             py::arg("sizes"), py::arg("isa") = "auto", py::arg("precision") = "float32")
        .def("decode", &Decoder::decode, py::arg("tokens"), py::arg("edges"), py::arg("units"), py::arg("middles"), py::arg("cosines"),
             py::arg("sines"), py::arg("state"), py::arg("box") = py::none())
        .def_property_readonly("isa", &Decoder::isa)
        .def_property_readonly("nbytes", &Decoder::nbytes);
    py::class_<Convolution>(m, "Convolution")
        .def(py::init<const py::object&, const py::object&, const std::string&>(), py::arg("weight"), py::arg("bias"),
             py::arg("isa") = "auto")
        .def("forward", &Convolution::forward, py::arg("x"), py::arg("scale") = py::none(),
             py::arg("shift") = py::none(), py::arg("add") = py::none(), py::arg("silu") = false)
        .def_property_readonly("isa", &Convolution::isa)
        .def_property_readonly("nbytes", &Convolution::nbytes);
    py::class_<EncoderBlock>(m, "EncoderBlock")
        .def(py::init<const py::dict&, const std::string&, const std::string&>(), py::arg("weights"),
             py::arg("isa") = "auto", py::arg("precision") = "float32")
        .def("project", &EncoderBlock::project, py::arg("x"))
        .def("finish", &EncoderBlock::finish, py::arg("x"), py::arg("attended"))
        .def_property_readonly("isa", &EncoderBlock::isa)
        .def_property_readonly("nbytes", &EncoderBlock::nbytes);
    py::class_<WindowAttention>(m, "WindowAttention")
        .def(py::init<std::int64_t, std::int64_t, const py::object&, const py::object&, const std::string&,
                      const std::string&>(),
             py::arg("side"), py::arg("heads"), py::arg("cosines"), py::arg("sines"), py::arg("isa") = "auto",
             py::arg("precision") = "float32")
        .def("forward", &WindowAttention::forward, py::arg("qkv"), py::arg("padding"), py::arg("shape"), py::arg("lead"))
        .def_property_readonly("isa", &WindowAttention::isa)
        .def_property_readonly("nbytes", &WindowAttention::nbytes);
    py::class_<Outline>(m, "Outline")
        .def(py::init<const std::vector<std::pair<py::object, py::object>>&, const std::vector<int>&,
                      const std::vector<int>&, const std::string&>(),
             py::arg("layers"), py::arg("down"), py::arg("up"), py::arg("isa") = "auto")
        .def("forward", &Outline::forward, py::arg("x"))
        .def("draw", &Outline::draw, py::arg("logits"), py::arg("before"), py::arg("picture"), py::arg("shape"),
             py::arg("shown"), py::arg("clicks"), py::arg("sure"), py::arg("scale"), py::arg("blob"), py::arg("far"),
             py::arg("mean"), py::arg("deviation"))
        .def_property_readonly("isa", &Outline::isa)
        .def_property_readonly("nbytes", &Outline::nbytes);
}
