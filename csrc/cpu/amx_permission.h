// amx_permission.h - whether this process may use the matrix tiles of AMX. Not compiled per instruction set.
#pragma once

namespace sparse_ffn {

// True where the processor multiplies bf16 on tiles of the size that cpu/amx.h expects, and the system keeps them over a
// switch of threads. Asks the kernel for its permission, which is the process's from then on, and its children's.
bool amx_permitted();
// Whether it multiplies fp16 on them too.
bool amx_has_fp16();

}  // namespace sparse_ffn
