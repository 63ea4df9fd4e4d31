// Which of the builds this processor can run. Compiled for the oldest one; the rest of the library is built once per instruction set.

#include "tiles.h"

extern "C" const char* ov3_best_isa() {
#if defined(__x86_64__) && OV3_HAS_TILES
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return ov3::HardwareTiles::permitted() ? "amx_bf16" : "avx512_bf16";
    if (avx512) return "avx512";
    if (avx2) return "avx2";
#endif
    return "portable";
}
