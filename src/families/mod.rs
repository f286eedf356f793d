//! Model families: from `config.json` and tensor names to a [`MoeSpec`] and its weights.
//!
//! A family is one file: the keys it reads, the keys that do not concern the layer, the names of its
//! tensors. A key that is neither is reported, a value without an implementation is refused, and so is
//! a tensor of the layer that nothing reads: no parameter of a model is dropped in silence.

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::spec::{ActivationQuant, FloatType, MoeSpec};
use crate::weights::{MoeWeights, RouterWeights};

use loader::Source;
use model::{Family, RouterKind};
use reading::{Reading, is_hash};

mod afmoe;
mod bailing;
mod cohere2_moe;
mod config;
mod dbrx;
mod deepseek_v2;
mod deepseek_v3;
mod deepseek_v4;
mod ernie;
mod flint;
mod gemma4;
mod gguf;
mod glm;
mod gpt_oss;
mod granite;
mod hunyuan;
mod inkling;
mod irrelevant;
mod kimi_linear;
mod kin;
mod kolibri1;
mod laguna;
mod layers;
mod lfm2_moe;
mod llama4;
mod loader;
mod longcat;
mod minimax;
mod mistral;
mod mixtral;
mod model;
mod muse_spark;
mod names;
mod nemotron_h;
mod olmoe;
mod phimoe;
mod quantization;
mod qwen;
mod reader;
mod reading;
mod step;
mod tensors;
mod zaya;
static FAMILIES: &[Family] = &[
    afmoe::FAMILY,
    kin::AXK1,
    bailing::FAMILY,
    cohere2_moe::FAMILY,
    dbrx::FAMILY,
    deepseek_v2::FAMILY,
    deepseek_v3::FAMILY,
    deepseek_v4::FAMILY,
    kin::DOTS1,
    ernie::FAMILY,
    kin::EXAONE_MOE,
    olmoe::FLEX_OLMO,
    flint::FAMILY,
    gemma4::FAMILY,
    glm::GLM4_MOE,
    glm::GLM4_MOE_LITE,
    glm::GLM4V_MOE,
    glm::GLM5_NEXT,
    glm::GLM_MOE_DSA,
    gpt_oss::FAMILY,
    granite::GRANITEMOE,
    granite::GRANITEMOEHYBRID,
    granite::GRANITEMOESHARED,
    hunyuan::HUNYUAN_V1_MOE,
    hunyuan::HY_V3,
    hunyuan::HY_V4,
    inkling::FAMILY,
    olmoe::JAMBA,
    granite::JETMOE,
    kimi_linear::FAMILY,
    kolibri1::FAMILY,
    laguna::FAMILY,
    lfm2_moe::FAMILY,
    llama4::FAMILY,
    longcat::FAMILY,
    kin::MIMO_V2_FLASH,
    mixtral::MINIMAX,
    minimax::MINIMAX_M2,
    minimax::MINIMAX_M3,
    mistral::MISTRAL4,
    mistral::MISTRAL_LARGE4,
    mixtral::FAMILY,
    muse_spark::FAMILY,
    nemotron_h::FAMILY,
    olmoe::OLMOE,
    phimoe::FAMILY,
    qwen::QWEN2_MOE,
    qwen::QWEN3_5_MOE,
    qwen::QWEN3_MOE,
    qwen::QWEN3_NEXT,
    qwen::QWEN3_VL_MOE,
    qwen::QWEN4_EXP,
    kin::SOLAR_OPEN,
    step::FAMILY,
    zaya::FAMILY,
];

/// What a family reads: a row of the table of what is supported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Support {
    /// The family.
    pub family: &'static str,
    /// Values of `model_type`; `_text` behind one of them is the same.
    pub model_types: &'static [&'static str],
    /// Some of its models.
    pub models: &'static [&'static str],
    /// How its routed experts may be stored. `fused` is gate and up in one tensor of all experts, in either
    /// orientation; `stacked` and `flat` are a tensor for each of gate, up and down.
    pub layouts: Vec<&'static str>,
}

/// Every family, by name.
pub fn support() -> Vec<Support> {
    let row = |family: &Family| {
        let mut layouts: Vec<&str> = family.names.experts.iter().map(|experts| experts.layout.name()).collect();
        layouts.dedup();
        Support { family: family.name, model_types: family.model_types, models: family.examples, layouts }
    };
    FAMILIES.iter().map(row).collect()
}

/// Which layer is wanted, and what a checkpoint does not say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Request {
    /// The layer; `None` for the first Mixture-of-Experts layer that is here.
    pub layer: Option<usize>,
    /// Type of `hidden_states`.
    pub input: FloatType,
    /// Type of the output.
    pub output: FloatType,
    /// Run-time quantisation of what experts of FP8, INT8 or four bits read. What the checkpoint says of it is a
    /// note, not an order.
    pub activations: ActivationQuant,
}

/// A layer of a checkpoint: its spec, and where its tensors are.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The family that read `config.json`.
    pub family: &'static str,
    /// `model_type` as `config.json` has it.
    pub model_type: String,
    /// The layer that was resolved.
    pub layer: Option<usize>,
    /// What it computes; valid.
    pub spec: MoeSpec,
    /// Keys of `config.json` that nobody reads and that may concern the layer, nested ones with their
    /// path (`quantization_config.KEY`). The spec may lack what they say.
    pub unknown_keys: Vec<String>,
    /// What a reader of the result should know.
    pub notes: Vec<String>,
    source: Source,
}

impl Resolved {
    /// The layer's weights, borrowed from `checkpoint`, checked against the spec. Without experts
    /// if this is the result of [`resolve_router`].
    ///
    /// # Errors
    /// Names a tensor that is missing, misshapen, of another dtype or without a use.
    pub fn weights<'a>(&self, checkpoint: &'a Checkpoint) -> Result<MoeWeights<'a>> {
        self.source.weights(checkpoint, &self.spec)
    }

    /// The router's weights, borrowed from `checkpoint`, checked against the spec.
    ///
    /// # Errors
    /// As [`Resolved::weights`].
    pub fn router_weights<'a>(&self, checkpoint: &'a Checkpoint) -> Result<RouterWeights<'a>> {
        self.source.router_weights(checkpoint, &self.spec)
    }
}

/// A layer of a model, and what of it is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerHere {
    /// Its number.
    pub layer: usize,
    /// Whether it has no experts by `config.json`.
    pub dense: bool,
    /// Names of the tensors of its block that are here, sorted; none of a dense layer.
    pub tensors: Vec<String>,
}

/// Every layer of the model, and its tensors that are here.
///
/// # Errors
/// A `config.json` that [`resolve`] refuses for every layer.
pub fn layers(checkpoint: &Checkpoint) -> Result<Vec<LayerHere>> {
    let reading = Reading::of(checkpoint)?;
    let sites = names::sites(checkpoint, reading.names);
    let here = |layer: usize| {
        let dense = reading.block(layer).is_err();
        let tensors = if dense { vec![] } else { names::tensors(checkpoint, reading.names, &sites, layer) };
        LayerHere { layer, dense, tensors }
    };
    Ok((0..reading.model.layers.len()).map(here).collect())
}

/// Finds a Mixture-of-Experts layer and says what it computes. With [`Request::layer`] `None` this is the first
/// layer of which all tensors are here; a layer that is here in part is a note.
///
/// # Errors
/// [`Error::Unsupported`] for a `model_type`, a value, a weight format or a tensor that has no
/// implementation; [`Error::MissingTensor`]; [`Error::Invalid`] for a key that is missing,
/// contradictory or of the wrong type, for a dense layer, and for tensors that disagree with
/// `config.json`.
pub fn resolve(checkpoint: &Checkpoint, request: &Request) -> Result<Resolved> {
    let reading = Reading::of(checkpoint)?;
    let (family, names) = (reading.family, reading.names);
    let sites = names::sites(checkpoint, names);
    let whole = |layer: usize| {
        gguf::check(checkpoint, family, reading.block(layer)?, false)?;
        let site = reading.site(checkpoint, &sites, layer)?;
        let source = Source::layer(checkpoint, &reading, site)?;
        let resolved = reading.resolved(checkpoint, request, layer, source)?;
        // Reads every name, so that an absent or surplus tensor shows now.
        resolved.weights(checkpoint)?;
        Ok(resolved)
    };
    if let Some(layer) = request.layer {
        return whole(layer);
    }
    let mut incomplete = None;
    for &layer in sites.keys().filter(|layer| reading.block(**layer).is_ok()) {
        match whole(layer) {
            Ok(mut resolved) => {
                resolved
                    .notes
                    .extend(incomplete.map(|(layer, error)| format!("layer {layer} was passed over: {error}")));
                return Ok(resolved);
            }
            Err(error @ Error::MissingTensor { name: _, searched: _, remedy: _ }) => {
                incomplete.get_or_insert((layer, error));
            }
            Err(error) => return Err(error),
        }
    }
    Err(incomplete.map_or_else(|| reading.no_layer(checkpoint), |(_, error)| error))
}

/// Finds a router alone and says how it routes. In a checkpoint without layers, tensors are known by
/// their last components (`gate.weight`, `gate.e_score_correction_bias`, ...).
///
/// [`Request::layer`] `None` is the first Mixture-of-Experts layer that is not hash-routed. No expert is looked
/// at: `experts` and `shared` of the spec are as `config.json` says, in the router's weight format.
///
/// # Errors
/// As [`resolve`]; also for [`Request::activations`] other than `None`, which a router has no use for.
pub fn resolve_router(checkpoint: &Checkpoint, request: &Request) -> Result<Resolved> {
    let reading = Reading::of(checkpoint)?;
    let (family, names) = (reading.family, reading.names);
    let sites = names::sites(checkpoint, names);
    if request.activations != ActivationQuant::None {
        return Err(reading.unsupported_activations(request.activations, "a router alone reads no experts".into()));
    }
    let top_k = |layer: &usize| reading.block(*layer).is_ok_and(|block| !is_hash(block));
    // A router that is alone says by its tensors whether it is of a layer that a state enters.
    let state_enters = names::has_states_scale(checkpoint, names);
    let same_state = |layer: &usize| match reading.block(*layer).map(|block| block.router) {
        Ok(RouterKind::Mlp { state_size: _, rms_norm_eps: _, previous_state }) => previous_state == state_enters,
        Ok(RouterKind::Linear { input: _, bias: _, transform: _ }) | Err(_) => true,
    };
    let first = || match sites.is_empty() {
        true => (0..reading.model.layers.len()).find(|layer| top_k(layer) && same_state(layer)),
        false => sites.keys().copied().find(top_k),
    };
    let layer = request.layer.or_else(first).ok_or_else(|| reading.no_layer(checkpoint))?;
    gguf::check(checkpoint, family, reading.block(layer)?, true)?;
    let router = reading.block(layer)?.router;
    let source = match sites.is_empty() {
        true => Source::bare_router(checkpoint, &reading, router)?,
        false => {
            let site = reading.site(checkpoint, &sites, layer)?;
            Source::router_of_layer(checkpoint, &reading, site)
        }
    };
    let resolved = reading.resolved(checkpoint, request, layer, source)?;
    resolved.router_weights(checkpoint)?;
    Ok(resolved)
}
