"""What a kernel does, by its name: one ordered table for the libraries of NVIDIA, of AMD, of Triton and for ours."""

import re
from functools import cache

from pi0exp.slices import Kind, Slice

CATEGORIES = ("gemm", "attention", "norm", "activation", "rope", "elementwise", "copy", "other")


def _fused(*operations: str) -> str:
    """An Inductor kernel, triton_KIND_fused_OPERATION_OPERATION_.._NUMBER, that fuses all of these operations."""
    return r"^triton_[a-z]+_fused" + "".join(rf"(?=.*?_(?:{one})(?![a-z0-9]))" for one in operations)


_LAYOUT_ONLY = (
    "_to_copy|_unsafe_view|_scaled_dot_product\\w*?attention|_unsafe_index|mm|bmm|arange|as_strided|cat|clone|constant_pad_nd"
    "|copy_?|embedding|empty|expand|full|gather|index|permute|repeat|reshape|scalar_tensor|select|slice|split|squeeze"
    "|stack|t|transpose|unbind|unsqueeze|view|zeros"
)
"""Operations of an Inductor name that only move values. mm and bmm stand there for the product whose output is read."""

TABLE: tuple[tuple[str, str], ...] = (
    # Inductor: by what a kernel fuses. `tem` are its templates, the only ones in which mm is a product of its own.
    ("attention", r"^triton_tem_fused\w*(attention|flex)"),
    ("gemm", r"^triton_tem_fused"),
    ("attention", _fused("softmax|_softmax|prepare_softmax_online")),
    ("norm", _fused("native_layer_norm|layer_norm|rms_norm|_fused_rms_norm|rsqrt|native_group_norm|native_batch_norm")),
    # Rotated halves: cat([-high, low]).
    ("rope", _fused("neg", "cat")),
    # A reduction over mm: a product of one row, or few, written as sums.
    ("gemm", r"^triton_(red|per|mix)_fused" + r"(?=\w*?_(mm|addmm|bmm|mv|addmv|dot)(?![a-z0-9]))"),
    ("activation", _fused("gelu|silu|relu|tanh|sigmoid|gelu_tanh")),
    ("copy", rf"^triton_poi_fused(_({_LAYOUT_ONLY}))+(_\d+)?(\.kd| [\[(]|$)"),
    ("elementwise", r"^triton_(poi|red|per|mix|for|split_scan)_fused"),
    # Attention before gemm: flash (Dao's, PyTorch's, FA3 in CUTLASS), fmha (CUTLASS, CK, aiter), cuDNN's sdpa,
    # AOTriton's attn_fwd, SageAttention's sage_fwd, FlashInfer's *With*KVCache, our attend_*; eager attention's softmax
    # (PyTorch, MIOpen).
    ("attention", r"fmha|flash(?!infer)|attn|attention|sdpa|sage_fwd|soft_?max|attend_|\b(mha|mla|pa)_"),
    ("attention", r"(Prefill|Decode)With"),
    # Our rope_qkv, aiter's kn_entry_*, vLLM's rotary_embedding, fused_qk_norm_rope.
    ("rope", r"rope(?![a-z])|rotary|kn_entry_\dc"),
    # A convolution of each channel with a few weights of its own (llama.cpp's ssm_conv, Mamba's) is no product.
    ("elementwise", r"ssm_conv|causal_conv|depthwise"),
    # cuBLAS: nvjet, gemm*, gemv*, splitKreduce, xmma; CUTLASS: Kernel2, device_kernel, cutlass_*; cuDNN's and MIOpen's
    # convolutions, which are products, too; Tensile (hipBLASLt, rocBLAS): Cijk_*; CK and aiter: *gemm*; vLLM on ROCm:
    # wvSplitK, LLMM1; llama.cpp's mul_mat_q, mul_mat_vec_q; Triton kernels called matmul or mm; our tile_gemm,
    # skinny_gemm, patch_embed, stream_*.
    ("gemm", r"^patch_embed_|^stream_(qkv|gated|residual|embed|begin|end|layers|ring|wide)_"),
    ("gemm", r"gemm|gemv|nvjet|cublas|split_?k|xmma|wgmma|cutlass|Cijk_|matmul|mul_mat|flatmm|LLMM|(^|_)b?mm(_|$)"),
    ("gemm", r"\bdot_kernel|convol|conv[123]d|conv_|igemm|winograd|ConvAsm|AsmConv|conv.*(fwd|fprop)|fprop"),
    # PyTorch's, Apex's, TransformerEngine's, Liger's, aiter's (Rmsnorm2dFwd, layernorm2d), our *_norm. In eager RMSNorm
    # the mean and the reciprocal root are kernels; nothing else in this policy takes either.
    ("norm", r"norm(?!al)|(^|_)rms_|RowwiseMoments|Welford|rsqrt|MeanOps"),
    # PyTorch's GeluCUDAKernel, silu_kernel, tanh_kernel; vLLM's and aiter's act_and_mul; our gated_activation.
    ("activation", r"gelu|silu|swiglu|geglu|relu|act_and_mul|activation|sigmoid|tanh"),
    # Profilers' copies and fills; ROCm's __amd_rocclr_copyBuffer and fillBuffer*; PyTorch's copy, cat, fill, index and
    # gather kernels; cuDNN's and MIOpen's changes of layout.
    ("elementwise", r"with_index|arange"),
    ("copy", r"mem(cpy|set)|copy|fill|CatArray|transpose|permute|gather|scatter|index|embedding|nchw|nhwc|im2col|pad_"),
    # What is left of PyTorch's and of CUB's: sums, comparisons, scans, random numbers; quantization of vLLM and aiter.
    ("elementwise", r"elementwise|pointwise|functor|reduce_|scan|random|distrib|at(::|6)native|quant|cub::|OpTensor"),
)  # fmt: skip
"""(category, pattern), the first that is found in a name decides; case does not matter."""

_COMPILED = tuple((category, re.compile(pattern, re.IGNORECASE)) for category, pattern in TABLE)
_BUILTIN_COPY = (Kind.copy, Kind.fill)


@cache
def category_of(name: str) -> str:
    """The category of a kernel by its name, demangled, mangled or with rocprof's .kd behind it."""
    return next((category for category, pattern in _COMPILED if pattern.search(name)), "other")


def category(one: Slice) -> str:
    return "copy" if one.kind in _BUILTIN_COPY else category_of(one.name)
