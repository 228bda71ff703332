"""Did it really run: promised names against names of a profile."""

import pytest

from pi0exp.attention.sdpa import Backend, Sdpa
from pi0exp.compile_mode.default import Default
from pi0exp.graphs.manual import Manual
from pi0exp.option import Option
from pi0exp.proof import unproven

NAMES = {
    "nvjet_tst_128x64_64x8_2x1_v_bz_TNT",
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<256, 64, 64, 4>>",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7",
    "triton_poi_fused_add_mul_0",
    "cudaLaunchKernel",
    "cudaGraphLaunch",
}


def test_kept_promises_are_not_mentioned():
    assert unproven([("graphs", r"(cuda|hip)GraphLaunch"), ("attention", "flash_fwd")], NAMES) == []


def test_broken_promise_is_one_sentence_that_names_it():
    (text,) = unproven([("graphs", "hipGraphLaunch"), ("attention", "flash_fwd")], NAMES)
    assert text == "graphs: no GPU kernel or runtime call of the profile matches /hipGraphLaunch/"


def test_every_promise_is_looked_at():
    assert len(unproven([("attention", "fmha"), ("attention.denoise", "fmha"), ("gemm", "nvjet")], NAMES)) == 2


def test_pattern_matches_within_a_name_unless_anchored():
    assert unproven([("compile_mode", "^triton_")], NAMES) == []
    assert unproven([("compile_mode", "^poi_")], NAMES)


def test_empty_profile_proves_nothing():
    assert unproven([("graphs", "GraphLaunch")], set())


def test_nothing_promised_is_nothing_broken():
    assert unproven([], NAMES) == []


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (Manual(), "cudaGraphLaunch"),
        (Manual(), "hipGraphLaunch"),
        (Default(), "triton_poi_fused_add_mul_0"),
        (Sdpa(backend=Backend.flash), "void pytorch_flash::flash_fwd_kernel<...>"),
        (Sdpa(backend=Backend.flash), "void pytorch_flash::flash_fwd_splitkv_kernel<...>"),
        (Sdpa(backend=Backend.cudnn), "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"),
        (
            Sdpa(backend=Backend.efficient),
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        ),
        (Sdpa(), "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"),
        (Sdpa(), "void pytorch_flash::flash_fwd_splitkv_kernel<...>"),
        (Sdpa(), "attn_fwd"),
    ],
)
def test_kernels_prove_their_options(option: Option, name: str):
    assert unproven([("it", option.proof())], {name}) == []


@pytest.mark.parametrize(
    ("option", "names"),
    [
        (Manual(), {"cudaLaunchKernel", "cudaGraphInstantiate"}),
        (Default(), {"void at::native::vectorized_elementwise_kernel<4>", "_my_triton_kernel"}),
        (Sdpa(backend=Backend.flash), {"fmha_cutlassF_bf16", "cudnn_generated_fort_native_sdpa_sm90", "nvjet_tst"}),
        (Sdpa(backend=Backend.cudnn), {"void pytorch_flash::flash_fwd_kernel<...>", "fmha_cutlassF_bf16"}),
        (Sdpa(), {"void at::native::softmax_warp_forward<float>", "nvjet_tst_128x64"}),
    ],
)
def test_other_kernels_do_not(option: Option, names: set[str]):
    assert unproven([("it", option.proof())], names)
