// Our own kernels for the attention and cache operators of language models (llama_kernels.cpp).
#pragma once

namespace boa {

// The instruction set that attention was compiled for and that runs here, or null where the kernels could not be
// registered with the runtime.
const char* attention_kernel();

}  // namespace boa
