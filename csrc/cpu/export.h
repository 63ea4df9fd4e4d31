// What Python sees: plain C functions, one per operator's step and dtype, called through ctypes (ov3fast/ops/cpu/__init__.py).
//
// No header of Python or PyTorch takes part, so one build serves every version of them. Arguments are pointers (null where a tensor is not
// given), int64_t and double; threads come last. The result is 0, or 1 where memory could not be had.
#pragma once

#include <new>

#include "simd.h"

namespace ov3 {

// A pointer that becomes one of the type that the receiving parameter has.
struct Ptr {
    void* address;
    template <class T>
    operator T*() const { return static_cast<T*>(address); }
};

template <class Body>
inline int guarded(const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace ov3

// OV3_EXPORT(name, (parameters), (arguments)): name<float> and name<bf16> as ov3_name_f32 and ov3_name_bf16.
#define OV3_EXPORT(name, parameters, arguments)                                                          \
    extern "C" int ov3_##name##_f32 parameters { return ov3::guarded([&] { name<float> arguments; }); }  \
    extern "C" int ov3_##name##_bf16 parameters { return ov3::guarded([&] { name<ov3::bf16> arguments; }); }

// The same for operators that take bfloat16 activations with parameters of either dtype: name<activation, parameter> as ov3_name_f32,
// ov3_name_bf16 and ov3_name_bf16_f32.
#define OV3_EXPORT_MIXED(name, parameters, arguments)                                                                            \
    extern "C" int ov3_##name##_f32 parameters { return ov3::guarded([&] { name<float, float> arguments; }); }                   \
    extern "C" int ov3_##name##_bf16 parameters { return ov3::guarded([&] { name<ov3::bf16, ov3::bf16> arguments; }); }          \
    extern "C" int ov3_##name##_bf16_f32 parameters { return ov3::guarded([&] { name<ov3::bf16, float> arguments; }); }
