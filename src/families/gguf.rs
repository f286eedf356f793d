//! GGUF: llama.cpp's names of a layer's tensors, whatever the family, and what it stores in another shape.
//!
//! Source: `gguf-py/gguf/constants.py` and `convert_hf_to_gguf.py` of llama.cpp. Values are those of the model's own
//! checkpoint; interleaved gate and up become tensors of their own.

use super::model::{Block, Family, Layer, Model, RouterKind};
use super::names::{Layout, MLP, Mlp, Names, Parts, named, stacked};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, Unsupported};
use crate::spec::{GateUpLayout, Orientation, RouterInput, RoutingMethod, WeightFormat};
use crate::weights::GgufBlock;

/// What the names of the parts of a layer begin with, also of those that nothing here reads.
const PARTS: &[&str] = &[
    "ffn_gate_inp",
    "exp_probs_b",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_gate_up_exps",
    "ffn_down_exps",
    "ffn_gate_inp_shexp",
    "ffn_gate_shexp",
    "ffn_up_shexp",
    "ffn_gate_up_shexp",
    "ffn_down_shexp",
    "ffn_gate_chexps",
    "ffn_up_chexps",
    "ffn_down_chexps",
    "ffn_gate_tid2eid",
    "ffn_latent_down",
    "ffn_latent_up",
];

const GATED: Names = Names {
    layers: "blk",
    modules: &[""],
    parts: PARTS,
    router: &["ffn_gate_inp"],
    router_bias: &["ffn_gate_inp.bias"],
    selection_bias: &["exp_probs_b.bias"],
    experts: &[
        stacked("", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"),
        Mlp {
            module: "",
            layout: Layout::Fused {
                gate_up: "ffn_gate_up_exps.weight",
                down: "ffn_down_exps.weight",
                rows: GateUpLayout::Halves,
                orientation: Some(Orientation::OutIn),
            },
        },
    ],
    shared: &[named("", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")],
    shared_gate: &["ffn_gate_inp_shexp.weight"],
    ..MLP
};

/// Experts without gate.
const PLAIN: Names = Names {
    experts: &[Mlp {
        module: "",
        layout: Layout::Stacked(Parts { gate: None, up: "ffn_up_exps.weight", down: "ffn_down_exps.weight" }),
    }],
    shared: &[Mlp {
        module: "",
        layout: Layout::Each(Parts { gate: None, up: "ffn_up_shexp", down: "ffn_down_shexp" }),
    }],
    ..GATED
};

static GATED_NAMES: Names = GATED;
static PLAIN_NAMES: Names = PLAIN;

/// The names of a family's tensors in this checkpoint.
pub(super) fn names(checkpoint: &Checkpoint, family: &'static Family, model: &Model) -> &'static Names {
    let gated = model.layers.iter().any(|layer| match layer {
        Layer::Dense => false,
        Layer::Moe(block) => block.activation.gated(),
    });
    match (checkpoint.is_gguf(), gated) {
        (false, _) => &family.names,
        (true, true) => &GATED_NAMES,
        (true, false) => &PLAIN_NAMES,
    }
}

/// Refuses a layer with parameters whose names in GGUF nothing here knows.
pub(super) fn check(checkpoint: &Checkpoint, family: &Family, block: &Block, router_only: bool) -> Result<()> {
    if !checkpoint.is_gguf() {
        return Ok(());
    }
    let (mlp, scaled) = match block.router {
        RouterKind::Mlp { state_size: _, rms_norm_eps: _, previous_state: _ } => (true, false),
        RouterKind::Linear { input: RouterInput::Hidden, bias: _, transform: _ } => (false, false),
        RouterKind::Linear { input: RouterInput::RmsNormScaled { eps: _ }, bias: _, transform: _ } => (false, true),
    };
    let (hash, joint) = match &block.method {
        RoutingMethod::Hash { score: _, vocab_size: _ } => (true, false),
        RoutingMethod::JointNorm { num_shared: _, global_scale: _ } => (false, true),
        RoutingMethod::TopK { score: _, key: _, groups: _ }
        | RoutingMethod::TopKThenScore { score: _ }
        | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => (false, false),
    };
    let whole = !router_only;
    let roles = [
        ("router", "an MLP", mlp),
        ("router.input_scale", "factors on the router's input", scaled),
        ("routing.method", "a hash table of token ids", hash),
        ("routing.method", "shared experts that the router weighs", joint),
        ("routing.per_expert_scale", "factors on the routing weights", block.per_expert_scale),
        ("latent", "projections to a latent width", whole && block.latent.is_some()),
        ("output_bias", "a bias on the routed sum", whole && block.output_bias),
        ("output_norm", "a norm on the output", whole && block.output_norm.is_some()),
    ];
    match roles.into_iter().find(|(_, _, needed)| *needed) {
        None => Ok(()),
        Some((field, value, _)) => Err(Error::Unsupported(Unsupported {
            backend: format!("family {}", family.name).into(),
            field: field.into(),
            value: value.into(),
            because: "it is not read from GGUF; give the safetensors checkpoint".into(),
        })),
    }
}

/// Refuses a matrix that is stored in another format than the first one of its MLP.
pub(super) fn several_formats(name: &str, found: WeightFormat, first: WeightFormat) -> Error {
    let value = match GgufBlock::of(found) {
        Some(_) => format!("{found:?}"),
        None => "plain numbers".into(),
    };
    Error::Unsupported(Unsupported {
        backend: "moewe".into(),
        field: format!("{name}.type").into(),
        value,
        because: format!(
            "the first matrix of these experts is {first:?}, and experts whose matrices have several formats are \
             not implemented; quantise all of them alike (llama-quantize --pure)"
        )
        .into(),
    })
}
