// Which instruction sets were built, which of them this CPU can run, and how one is chosen by name.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace i2f {

struct Path {
    const Kernels* kernels;  // null: not built for this processor family
    std::string name;
    std::string reason;  // empty: usable; else why not
};

enum class Precision { float32, bfloat16 };  // of the operands of products

// All paths by preference, best first; portable (and in float32 scalar) is always usable.
const std::vector<Path>& paths(Precision precision);

// Whether bfloat16 is faster than float32 here. Intel's AVX-512 BF16 is not, without AMX: it multiplies twice as many
// numbers a step, in twice the time, and operands are to be rounded.
bool bfloat16_pays();

// The path of that name, or the best usable one for "auto". Null when it is unknown or not usable here.
const Kernels* find_kernels(const std::string& name, Precision precision);

}  // namespace i2f
