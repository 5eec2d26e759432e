"""Classes of transformers with attention of their own that are not replaced, and the reasons.

Classes that ask transformers' registry of attention functions are not in this table, and neither
are those that another module here replaces. A class of none of these kinds is unknown, and
reported as such: looks_like_attention finds unknown classes by their form.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

from clinattn.integrations.outcome import Outcome

TERMS = "its scores have terms of content with position, products with q or k beyond q.k"
ROUTED = "which keys a query sees is computed from the data: another function"
APPROXIMATE = "approximates softmax attention: another function"
CORRELATION = "attends to lags of a series by autocorrelation, not to tokens"
RECURRENT = "a linear recurrence without a softmax over keys"
BLOCKS = "attends within blocks, and to means of blocks or tokens of their own, in one softmax"
RANDOM = "block-sparse attention with random blocks is another function"
DEFORMABLE = "samples a few points of feature maps: no attention over tokens"
NEIGHBOURS = "attends to a neighbourhood in two dimensions"
COSINE = "its scores are cosines of queries and keys, with a learned scale"
QUERIES = "words and entities have queries of their own for each kind of key"
SHARED = "a convolution over the tokens shares its projections and half of its heads"
POINTS = "its scores and results have distances of points in space"
LINEAR = "weighs tokens once, not each query with each key: another function"
SEVERAL = "combines its probabilities or scores with those of a second stream"
PROBABILITIES = "its scores or probabilities are themselves the result"
QUANTIZED = "made to compute in integers, softmax included"
DECODER = "a decoder with code of its own: causal masks and caches are not handled"
UNWRITTEN = "softmax attention in code of its own, for which no replacement is written"

RELEASE = "5.23"  # of transformers, whose classes these are; others have most of them

# {reason: {model: names of its classes}}
NOT_REPLACED: dict[str, dict[str, str]] = {
    TERMS: {
        "bros": "BrosSelfAttention",
        "deberta": "DisentangledSelfAttention",
        "deberta_v2": "DisentangledSelfAttention",
        "fastspeech2_conformer": "FastSpeech2ConformerAttention",
        "funnel": "FunnelRelMultiheadAttention",
        "gemma3n": "Gemma3nAudioAttention",
        "gemma4": "Gemma4AudioAttention",
        "granite_speech": "GraniteSpeechConformerAttention",
        "granite_speech_plus": "GraniteSpeechPlusConformerAttention",
        "prophetnet": "ProphetNetNgramSelfAttention",
        "sew_d": "DisentangledSelfAttention",
        "speecht5": "SpeechT5Attention",
        "vits": "VitsAttention",
        "xlnet": "XLNetRelativeAttention",
    },
    ROUTED: {
        "informer": "InformerProbSparseAttention",
        "reformer": "LSHSelfAttention",
    },
    LINEAR: {
        "mobilevitv2": "MobileViTV2LinearSelfAttention",
        "swiftformer": "SwiftFormerEfficientAdditiveAttention",
    },
    APPROXIMATE: {
        "mra": "MraSelfAttention",
        "nystromformer": "NystromformerSelfAttention",
        "yoso": "YosoSelfAttention",
    },
    CORRELATION: {"autoformer": "AutoformerAttention"},
    RECURRENT: {
        "bailing_hybrid": "BailingHybridDeltaAttention",
        "bamba": "BambaMixer",
        "falcon_h1": "FalconH1Mixer",
        "falcon_mamba": "FalconMambaMixer",
        "glm5_next": "Glm5NextTextLinearAttention",
        "jamba": "JambaMambaMixer",
        "kimi_linear": "KimiLinearDeltaAttention",
        "mamba": "MambaMixer",
        "mamba2": "Mamba2Mixer",
        "minimax": "MiniMaxLightningAttention",
        "nemotron_h": "NemotronHMamba2Mixer",
        "rwkv": "RwkvSelfAttention",
        "zamba": "ZambaMambaMixer",
        "zamba2": "Zamba2MambaMixer",
    },
    BLOCKS: {
        "longt5": "LongT5LocalAttention LongT5TransientGlobalAttention",
        "pegasus_x": "PegasusXGlobalLocalAttention",
        "reformer": "LocalSelfAttention",
    },
    RANDOM: {"bigbird_pegasus": "BigBirdPegasusBlockSparseAttention"},
    DEFORMABLE: {
        "d_fine": "DFineMultiscaleDeformableAttention",
        "deformable_detr": "DeformableDetrMultiscaleDeformableAttention",
        "deimv2": "Deimv2MultiscaleDeformableAttention",
        "grounding_dino": "GroundingDinoMultiscaleDeformableAttention",
        "lw_detr": "LwDetrMultiscaleDeformableAttention",
        "mask2former": "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention",
        "mm_grounding_dino": "MMGroundingDinoMultiscaleDeformableAttention",
        "omdet_turbo": "OmDetTurboMultiscaleDeformableAttention",
        "oneformer": "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention",
        "pp_doclayout_v2": "PPDocLayoutV2MultiscaleDeformableAttention",
        "pp_doclayout_v3": "PPDocLayoutV3MultiscaleDeformableAttention",
        "pp_doclayout_v4": "PPDocLayoutV4MultiscaleDeformableAttention",
        "rf_detr": "RfDetrMultiscaleDeformableAttention",
        "rt_detr": "RTDetrMultiscaleDeformableAttention",
        "rt_detr_v2": "RTDetrV2MultiscaleDeformableAttention",
    },
    COSINE: {
        "swin2sr": "Swin2SRSelfAttention",
        "swinv2": "Swinv2SelfAttention",
    },
    QUERIES: {"luke": "LukeSelfAttention"},
    SHARED: {"convbert": "ConvBertSelfAttention"},
    POINTS: {"esm": "EsmFoldInvariantPointAttention"},
    NEIGHBOURS: {"dinat": "NeighborhoodAttention"},
    SEVERAL: {
        "grounding_dino": "GroundingDinoBiMultiHeadAttention",
        "lilt": "LiltSelfAttention",
        "mm_grounding_dino": "MMGroundingDinoBiMultiHeadAttention",
    },
    PROBABILITIES: {
        "conditional_detr": "ConditionalDetrMHAttentionMap",
        "dab_detr": "DabDetrMHAttentionMap",
        "detr": "DetrMHAttentionMap",
        "groupvit": "GroupViTAssignAttention",
        "maskformer": "MaskFormerDetrMHAttentionMap",
        "visual_bert": "VisualBertRegionToPhraseAttention",
    },
    QUANTIZED: {"ibert": "IBertSelfAttention"},
    DECODER: {
        "bark": "BarkSelfAttention",
        "bloom": "BloomAttention",
        "codegen": "CodeGenAttention",
        "cpmant": "CpmAntAttention",
        "falcon": "FalconAttention",
        "gpt_neo": "GPTNeoSelfAttention",
        "gpt_neox_japanese": "GPTNeoXJapaneseAttention",
        "gptj": "GPTJAttention",
        "imagegpt": "ImageGPTAttention",
        "led": "LEDDecoderAttention",
        "mpt": "MptAttention",
        "openai": "Attention",
        "trocr": "TrOCRAttention",
        "xglm": "XGLMAttention",
    },
    UNWRITTEN: {
        "bigbird_pegasus": "BigBirdPegasusSelfAttention",
        "blip": "BlipAttention BlipTextSelfAttention",
        "canine": "CanineSelfAttention",
        "chameleon": "ChameleonVQVAEEncoderAttnBlock",
        "clap": "ClapAudioSelfAttention",
        "clvp": "ClvpSelfAttention",
        "cvt": "CvtSelfAttention",
        "dab_detr": "DabDetrAttention DetrAttention",
        "data2vec": "Data2VecVisionSelfAttention",
        "deepseek_ocr2": "DeepseekOcr2SamVisionAttention",
        "donut": "DonutSwinSelfAttention",
        "esm": "EsmFoldAttention EsmFoldSelfAttention",
        "esmfold2": "EsmFold2RowAttentionPooling",
        "evolla": "EvollaSequenceAlignerCrossAttention EvollaSequenceCompressorAttention",
        "flava": "FlavaSelfAttention",
        "fsmt": "Attention",
        "git": "GitSelfAttention",
        "glpn": "GLPNEfficientSelfAttention",
        "got_ocr2": "GotOcr2VisionAttention",
        "grounding_dino": "GroundingDinoMultiheadAttention",
        "groupvit": "GroupViTAttention",
        "hiera": "HieraMaskUnitAttention",
        "janus": "JanusVQVAEAttnBlock",
        "layoutlmv2": "LayoutLMv2SelfAttention",
        "layoutlmv3": "LayoutLMv3SelfAttention",
        "levit": "LevitAttention LevitAttentionSubsample",
        "lxmert": "LxmertAttention",
        "mask2former": "Mask2FormerAttention",
        "maskformer": "MaskFormerSwinSelfAttention",
        "mgp_str": "MgpstrAttention",
        "mm_grounding_dino": "MMGroundingDinoMultiheadAttention",
        "mobilevit": "MobileViTSelfAttention",
        "mvp": "MvpAttention",
        "omdet_turbo": "OmDetTurboMultiheadAttention",
        "oneformer": "OneFormerAttention OneFormerTextMapperAttention",
        "perceiver": "PerceiverSelfAttention",
        "pp_doclayout_v2": "PPDocLayoutV2ReadingOrderSelfAttention",
        "pp_formulanet": "PPFormulaNetVisionAttention",
        "prophetnet": "ProphetNetAttention",
        "pvt": "PvtEfficientSelfAttention",
        "pvt_v2": "PvtV2SelfAttention",
        "sam": "SamVisionAttention",
        "sam_hq": "SamHQVisionAttention",
        "seggpt": "SegGptAttention",
        "slanet": "SLANetAttentionGRUCell",
        "slanext": "SLANeXtAttentionGRUCell SLANeXtVisionAttention",
        "squeezebert": "SqueezeBertSelfAttention",
        "superglue": "SuperGlueSelfAttention",
        "table_transformer": "TableTransformerAttention",
        "timesformer": "TimesformerSelfAttention",
        "tvp": "TvpAttention",
        "unlimited_ocr": "UnlimitedOcrSamVisionAttention",
        "vilt": "ViltSelfAttention",
        "vitdet": "VitDetAttention",
        "wavlm": "WavLMAttention",
        "zoedepth": "ZoeDepthMultiheadAttention",
    },
}

REASONS = {
    (model, name): reason
    for reason, models in NOT_REPLACED.items()
    for model, names in models.items()
    for name in names.split()
}


def reason_of(cls: type) -> str | None:
    """The reason of the table for this class of transformers, if it is there."""
    package, models, model = (*cls.__module__.split("."), "", "", "")[:3]
    if (package, models) != ("transformers", "models"):
        return None
    return REASONS.get((model, cls.__qualname__))


def adapt(module: nn.Module) -> Outcome | None:
    """Outcome with the reason why a module's class or a base is not replaced; None if unlisted."""
    if uses_registry(module):  # a subclass of one that does not
        return None
    for cls in type(module).__mro__:
        reason = reason_of(cls)
        if reason is not None:
            return Outcome(False, f"{cls.__qualname__}: {reason}")
    return None


def restore(module: nn.Module) -> bool:
    """Returns False: there is nothing to undo."""
    return False


def uses_registry(module: nn.Module) -> bool:
    """Returns whether set_attn_implementation reaches the module: its forward asks the registry."""
    return asks_registry(type(module))  # type: ignore[arg-type]


@cache
def asks_registry(cls: Any) -> bool:
    """Returns whether the forward of a module's class asks the registry; see uses_registry."""
    for base in cls.__mro__:
        source = _source(vars(base).get("forward"))
        if "ALL_ATTENTION_FUNCTIONS" in source:
            return True
        if source and "super()" not in source:
            return False
    return False


def _source(function: Any) -> str:
    """The source of a function; empty where there is none to read."""
    try:
        return "" if function is None else inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def calls_sdpa(module: nn.Module) -> bool:
    """Returns whether the module's own forward calls torch's attention, under any class name."""
    return "scaled_dot_product_attention(" in _source(type(module).forward)


def why_unknown(module: nn.Module) -> str:
    """The reason to give for a module that looks like attention or calls torch's."""
    if calls_sdpa(module):
        return (
            "calls torch's scaled_dot_product_attention: call clinattn.fused_attention there, or "
            "see clinattn.integrations.sdpa"
        )
    return f"{type(module).__name__} is not known"


def looks_like_attention(module: nn.Module) -> bool:
    """Returns whether a module that no adapter knows seems to compute attention.

    By its form: the name of its class has Attention or Attn in it; it owns two or more projections,
    or one to three times the width, for q, k and v; and nothing in it is replaced already. Such a
    module is to be named, not passed over.
    """
    if any(
        type(x).__module__.startswith("clinattn.")
        for x in module.modules()
        if not isinstance(x, nn.Linear)
    ):
        return False
    if re.search("Attention|Attn", type(module).__name__) is None:
        return False
    owners = [module, *(x for x in module.children() if not isinstance(x, nn.Embedding))]
    matrices = [x for m in owners for x in m.parameters(recurse=False) if x.dim() >= 2]
    fused = any(max(x.shape[:2]) == 3 * min(x.shape[:2]) for x in matrices)
    return len(matrices) >= 2 or fused
