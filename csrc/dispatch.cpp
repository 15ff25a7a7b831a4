#include "dispatch.h"

namespace i2f {
namespace {

std::vector<Path> probe() {
    std::vector<Path> found;
#ifdef I2F_X86
    // The built-ins also ask the operating system whether it saves the wide registers.
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    found.push_back({&kAvx512, "avx512", avx512 && avx2 ? "" : "this CPU or system lacks AVX-512 F, BW, DQ, VL"});
    found.push_back({&kAvx2, "avx2", avx2 ? "" : "this CPU or system lacks AVX2 or FMA"});
#else
    found.push_back({nullptr, "avx512", "built for another processor family"});
    found.push_back({nullptr, "avx2", "built for another processor family"});
#endif
    found.push_back({&kPortable, "portable", ""});
    found.push_back({&kScalar, "scalar", ""});
    return found;
}

}  // namespace

const std::vector<Path>& paths() {
    static const std::vector<Path> found = probe();
    return found;
}

const Kernels* find_kernels(const std::string& name) {
    for (const Path& path : paths()) {
        if (path.reason.empty() && (name == "auto" || name == path.name)) return path.kernels;
    }
    return nullptr;
}

}  // namespace i2f
