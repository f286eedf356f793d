//! Model families: from `config.json` and tensor names to a [`MoeSpec`] and its weights.
//!
//! A family is one file: the keys it reads, the keys that do not concern the layer, the names of its
//! tensors. A key that is neither is reported, a value without an implementation is refused, and so is
//! a tensor of the layer that nothing reads: no parameter of a model is dropped in silence.

use std::collections::BTreeMap;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, Unsupported};
use crate::spec::{
    Activation, ActivationQuant, ActivationScale, Denominator, Entry, ExpertInput, ExpertMlp, FloatType, GateUpLayout,
    LogitTransform, MoeSpec, NanPolicy, Orientation, Placement, Precision, Router, RouterInput, Routing, RoutingMethod,
    SharedCombination, SharedExperts, SharedGate, TensorShard, WeightFormat, WeightPosition,
};
use crate::weights::{MoeWeights, RouterWeights};

use config::{Config, TextConfig};
use loader::{Source, Stored};
use names::{Names, Site};
use quantization::Quantization;

mod config;
mod deepseek_v3;
mod deepseek_v4;
mod gpt_oss;
mod irrelevant;
mod loader;
mod mixtral;
mod names;
mod quantization;
mod qwen3_moe;

static FAMILIES: &[Family] =
    &[deepseek_v3::FAMILY, deepseek_v4::FAMILY, gpt_oss::FAMILY, mixtral::FAMILY, qwen3_moe::FAMILY];

/// A family, as data.
struct Family {
    name: &'static str,
    /// Values of `model_type`, without the `_text` of multimodal models' text parts.
    model_types: &'static [&'static str],
    /// Keys that do not concern the layer, beside those that concern no family's.
    irrelevant: &'static [&'static str],
    /// Ways to name the layer's tensors.
    modules: &'static [Names],
    read: fn(&Config<'_>) -> Result<Model>,
}

/// What `config.json` says about a model's Mixture-of-Experts layers.
struct Model {
    hidden_size: usize,
    num_experts: usize,
    top_k: usize,
    /// One entry a layer.
    layers: Vec<Layer>,
    /// The keys that decide which layers are dense, for messages.
    dense_keys: &'static str,
    renormalize: Option<Denominator>,
    routed_scaling_factor: f32,
    /// I of a routed expert, and of one shared expert.
    intermediate_size: usize,
    activation: Activation,
    /// Shared experts, at least one.
    shared: Option<usize>,
    shared_activation: Activation,
    notes: Vec<String>,
}

#[derive(Debug, Clone)]
enum Layer {
    Dense,
    Moe(RoutingMethod),
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
    /// Run-time quantisation of what FP8 experts read. An `activation_scheme` of the checkpoint is a
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
    let sites = names::sites(checkpoint, reading.family.modules);
    let whole = |layer: usize| {
        reading.method(layer)?;
        let site = reading.site(checkpoint, &sites, layer)?;
        let source = Source::layer(checkpoint, reading.family.name, site)?;
        let resolved = reading.resolved(checkpoint, request, layer, source)?;
        // Reads every name, so that an absent or surplus tensor shows now.
        resolved.weights(checkpoint)?;
        Ok(resolved)
    };
    if let Some(layer) = request.layer {
        return whole(layer);
    }
    let mut incomplete = None;
    for &layer in sites.keys().filter(|layer| reading.method(**layer).is_ok()) {
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
    let sites = names::sites(checkpoint, reading.family.modules);
    if request.activations != ActivationQuant::None {
        return Err(reading.unsupported_activations(request.activations, "a router alone reads no experts".into()));
    }
    let top_k = |layer: &usize| reading.method(*layer).is_ok_and(|method| !is_hash(method));
    let first = || match sites.is_empty() {
        true => (0..reading.model.layers.len()).find(top_k),
        false => sites.keys().copied().find(top_k),
    };
    let layer = request.layer.or_else(first).ok_or_else(|| reading.no_layer(checkpoint))?;
    reading.method(layer)?;
    let family = reading.family;
    let source = match sites.is_empty() {
        true => Source::bare_router(checkpoint, family.name, family.modules)?,
        false => Source::router_of_layer(family.name, reading.site(checkpoint, &sites, layer)?),
    };
    let resolved = reading.resolved(checkpoint, request, layer, source)?;
    resolved.router_weights(checkpoint)?;
    Ok(resolved)
}

/// A `config.json` that was read.
struct Reading {
    family: &'static Family,
    model_type: String,
    model: Model,
    quantization: Option<Quantization>,
    unknown_keys: Vec<String>,
}

impl Reading {
    fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let text = TextConfig::of(checkpoint.config())?;
        let (family, model_type) = find_family(&text)?;
        let (quantization, unknown_quantization) = Quantization::read(family.name, &text)?;
        let config = Config::new(family.name, text.path, text.text);
        config.get("model_type");
        config.get("quantization_config");
        let model = (family.read)(&config)?;
        let mut unknown_keys = config.unknown(&[irrelevant::SHARED, family.irrelevant]);
        unknown_keys.extend(unknown_quantization);
        unknown_keys.extend(text.unknown());
        Ok(Self { family, model_type, model, quantization, unknown_keys })
    }

    /// The routing of a layer that has experts.
    fn method(&self, layer: usize) -> Result<&RoutingMethod> {
        match self.model.layers.get(layer) {
            Some(Layer::Moe(method)) => Ok(method),
            Some(Layer::Dense) => Err(Error::invalid(
                "layer",
                format!("{layer}, a dense layer by {}", self.model.dense_keys),
                format!("a Mixture-of-Experts layer ({})", self.moe_layers()),
                "ask for a layer that has experts",
            )),
            None => Err(Error::invalid(
                "layer",
                layer,
                format!("a layer below num_hidden_layers = {}", self.model.layers.len()),
                "ask for a layer that the model has",
            )),
        }
    }

    /// The layers that have experts, for messages.
    fn moe_layers(&self) -> String {
        let layers = || {
            let all = self.model.layers.iter().enumerate();
            all.filter(|(_, layer)| matches!(layer, Layer::Moe(_))).map(|(index, _)| index)
        };
        match (layers().next(), layers().next_back()) {
            (Some(first), Some(last)) => format!("{} of them, from {first} to {last}", layers().count()),
            (None, _) | (_, None) => "the model has none".into(),
        }
    }

    fn no_layer(&self, checkpoint: &Checkpoint) -> Error {
        let names: Vec<String> =
            self.family.modules.iter().map(|names| format!("layers.N.{}.*", names.module)).collect();
        loader::missing(checkpoint, format!("{} (N: {})", names.join(" or "), self.moe_layers()))
    }

    fn site<'s>(
        &self,
        checkpoint: &Checkpoint,
        sites: &'s BTreeMap<usize, Vec<Site>>,
        layer: usize,
    ) -> Result<&'s Site> {
        match sites.get(&layer).map(Vec::as_slice) {
            Some([site]) => Ok(site),
            Some([(one, _), (other, _), ..]) => Err(Error::invalid(
                "layer",
                format!("{layer}, which is both {one}* and {other}*"),
                "one module with experts a layer",
                "remove the tensors that are not meant",
            )),
            Some([]) | None => {
                let names = self.family.modules.iter().map(|names| format!("layers.{layer}.{}.*", names.module));
                Err(loader::missing(checkpoint, names.collect::<Vec<_>>().join(" or ")))
            }
        }
    }

    fn resolved(&self, checkpoint: &Checkpoint, request: &Request, layer: usize, source: Source) -> Result<Resolved> {
        let method = self.method(layer)?;
        let stored = source.stored(checkpoint, self.quantization.as_ref(), self.model.shared.is_some())?;
        let mut notes = self.model.notes.clone();
        let activations = match source.is_router_only() {
            true => (ActivationQuant::None, ActivationQuant::None),
            false => self.activation_quant(request, &stored, &mut notes)?,
        };
        let spec = self.spec(request, method, &stored, activations)?;
        spec.validate()?;
        Ok(Resolved {
            family: self.family.name,
            model_type: self.model_type.clone(),
            layer: Some(layer),
            spec,
            unknown_keys: self.unknown_keys.clone(),
            notes,
            source,
        })
    }

    fn spec(
        &self,
        request: &Request,
        method: &RoutingMethod,
        stored: &Stored,
        (routed_quant, shared_quant): (ActivationQuant, ActivationQuant),
    ) -> Result<MoeSpec> {
        let Model {
            hidden_size,
            num_experts,
            top_k,
            layers: _,
            dense_keys: _,
            renormalize,
            routed_scaling_factor,
            intermediate_size,
            activation,
            shared,
            shared_activation,
            notes: _,
        } = &self.model;
        let shared = match (shared, stored.shared) {
            (Some(count), Some(format)) => Some(SharedExperts {
                mlp: ExpertMlp {
                    intermediate_size: shared_width(*count, *intermediate_size)?,
                    activation: *shared_activation,
                    gate_up_layout: GateUpLayout::Separate,
                    orientation: Orientation::OutIn,
                    gate_up_bias: false,
                    down_bias: false,
                    format,
                    activation_quant: shared_quant,
                },
                gate: SharedGate::None,
                combination: SharedCombination::Sum,
            }),
            (Some(_) | None, _) => None,
        };
        Ok(MoeSpec {
            hidden_size: *hidden_size,
            num_experts: *num_experts,
            top_k: *top_k,
            router: Router::Linear {
                input: RouterInput::Hidden,
                format: stored.router,
                bias: self.family.modules.iter().any(|names| names.router_bias.is_some()),
                transform: LogitTransform::None,
            },
            routing: Routing {
                method: method.clone(),
                renormalize: *renormalize,
                routed_scaling_factor: *routed_scaling_factor,
                apply_routed_scale_to_output: false,
                per_expert_scale: false,
                weight_position: WeightPosition::Output,
                zero_experts: None,
                nan_policy: NanPolicy::Zero,
            },
            experts: ExpertMlp {
                intermediate_size: *intermediate_size,
                activation: *activation,
                gate_up_layout: stored.layout,
                orientation: stored.orientation,
                gate_up_bias: stored.biases,
                down_bias: stored.biases,
                format: stored.experts,
                activation_quant: routed_quant,
            },
            shared,
            latent: None,
            lora: None,
            expert_input: ExpertInput::Hidden,
            output_bias: false,
            placement: Placement::All,
            shard: TensorShard::Whole,
            entry: Entry::TokenMajor,
            precision: Precision::float32(request.input, request.output),
        })
    }

    fn unsupported_activations(&self, wanted: ActivationQuant, because: String) -> Error {
        Error::Unsupported(Unsupported {
            backend: format!("family {}", self.family.name).into(),
            field: "activations".into(),
            value: format!("{wanted:?}"),
            because: because.into(),
        })
    }

    /// Activation quantisation of the routed and the shared experts.
    fn activation_quant(
        &self,
        request: &Request,
        stored: &Stored,
        notes: &mut Vec<String>,
    ) -> Result<(ActivationQuant, ActivationQuant)> {
        let fp8 = |format: WeightFormat| match format {
            WeightFormat::Fp8Block { block: _, scale: _ } => true,
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => false,
        };
        let scheme = self.quantization.as_ref().and_then(|quantization| quantization.activation_scheme);
        let scale_fmt = self.quantization.as_ref().and_then(|quantization| quantization.scale_fmt);
        if self.quantization.is_some() && !fp8(stored.experts) {
            notes.push(format!("quantization_config says fp8, the experts are stored as {:?}", stored.experts));
        }
        match request.activations {
            ActivationQuant::None => {
                notes.extend(scheme.map(|scheme| {
                    format!(
                        "activation_scheme = {scheme} of the checkpoint is not applied: \
                         activations stay unquantised (--activations none)"
                    )
                }));
                Ok((ActivationQuant::None, ActivationQuant::None))
            }
            wanted @ ActivationQuant::DynamicFp8 { group: _, scale } => {
                if !fp8(stored.experts) {
                    let because = format!("the experts are stored as {:?}, not as FP8", stored.experts);
                    return Err(self.unsupported_activations(wanted, because));
                }
                match (scale_fmt, scale) {
                    (Some(fmt), ActivationScale::F32) => notes.push(format!(
                        "scale_fmt = {fmt} of the checkpoint is not applied to activations: their scales stay f32"
                    )),
                    (None, ActivationScale::F32)
                    | (Some(_) | None, ActivationScale::F32CeilPow2 | ActivationScale::Ue8m0Packed) => {}
                }
                let shared = match stored.shared {
                    Some(format) if !fp8(format) => {
                        notes.push(format!(
                            "the shared expert is stored as {format:?}: what it reads stays unquantised"
                        ));
                        ActivationQuant::None
                    }
                    Some(_) | None => wanted,
                };
                Ok((wanted, shared))
            }
        }
    }
}

fn is_hash(method: &RoutingMethod) -> bool {
    match method {
        RoutingMethod::Hash { score: _, vocab_size: _ } => true,
        RoutingMethod::TopK { score: _, key: _, groups: _ }
        | RoutingMethod::TopKThenScore { score: _ }
        | RoutingMethod::JointNorm { num_shared: _, global_scale: _ }
        | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => false,
    }
}

/// n shared experts of width I are one of width n I.
fn shared_width(count: usize, intermediate_size: usize) -> Result<usize> {
    count.checked_mul(intermediate_size).ok_or_else(|| {
        Error::invalid(
            "n_shared_experts",
            format!("{count} experts of width {intermediate_size}"),
            "a product that fits this machine",
            "correct n_shared_experts in config.json",
        )
    })
}

fn find_family(text: &TextConfig<'_>) -> Result<(&'static Family, String)> {
    let inner = text.text.get("model_type");
    let found = inner.or_else(|| text.outer.and_then(|outer| outer.get("model_type")));
    let Some(model_type) = found.and_then(|value| value.as_str()) else {
        return Err(Error::invalid(
            "model_type",
            found.map_or("no such key".into(), config::show),
            "the name of an architecture",
            "add the model's model_type to config.json",
        ));
    };
    let name = model_type.strip_suffix("_text").unwrap_or(model_type);
    let family = FAMILIES.iter().find(|family| family.model_types.contains(&name)).ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().flat_map(|family| family.model_types).copied().collect();
        Error::Unsupported(Unsupported {
            backend: "moewe".into(),
            field: "model_type".into(),
            value: model_type.to_owned(),
            because: format!("no family of this name; there are {}", known.join(", ")).into(),
        })
    })?;
    Ok((family, model_type.to_owned()))
}

/// A note if a family whose published models clamp has no limit in its config.
fn unclamped(config: &Config<'_>, published: &str) -> Vec<String> {
    match config.get("swiglu_limit") {
        Some(_) => Vec::new(),
        None => vec![format!("swiglu_limit is not in config.json: experts are not clamped (published {published})")],
    }
}
