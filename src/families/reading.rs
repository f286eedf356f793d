//! A `config.json` that was read, and the spec that it and the stored tensors give.

use std::collections::BTreeMap;

use serde_json::Value;

use super::config::{self, Config, TextConfig};
use super::loader::{self, Source, Stored, StoredMlp};
use super::model::{Block, Family, Gate, Layer, Model, RouterKind, Shared};
use super::names::{Names, Site};
use super::quantization::Quantization;
use super::{FAMILIES, Request, Resolved, gguf, irrelevant};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, Unsupported};
use crate::spec::{
    ActivationCode, ActivationQuant, ActivationScale, Entry, ExpertMlp, Latent, MoeSpec, NanPolicy, Placement,
    Precision, Router, Routing, RoutingMethod, SharedExperts, SharedGate, TensorShard, WeightFormat,
};

/// A `config.json` that was read.
pub(super) struct Reading {
    pub(super) family: &'static Family,
    /// The family's, or those of GGUF.
    pub(super) names: &'static Names,
    pub(super) model: Model,
    model_type: String,
    pub(super) quantization: Option<Quantization>,
    unknown_keys: Vec<String>,
    notes: Vec<String>,
}

impl Reading {
    pub(super) fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let text = TextConfig::of(checkpoint.config())?;
        let (family, model_type) = find_family(&text)?;
        let config = Config::new(family.name, text.path, text.text);
        let mut note = None;
        // In GGUF each tensor's type says its format.
        let (quantization, unknown_quantization) = match checkpoint.is_gguf() {
            true => {
                let said = [text.either("quantization_config")?, config.get("expert_dtype")];
                note = said.into_iter().flatten().find(|value| !value.is_null()).map(|_| {
                    "quantization_config and expert_dtype are not those of the GGUF files and are not read".to_owned()
                });
                (None, Vec::new())
            }
            false => Quantization::read(family.name, &text, &config)?,
        };
        config.get("model_type");
        config.get("quantization_config");
        let model = (family.read)(&config)?;
        // transformers lets single layers have keys of their own here; Gemma 4 has some of attention.
        let concerns = |value: &&Value| match value {
            Value::Null => false,
            Value::Object(layers) => layers.values().any(|keys| match keys {
                Value::Object(keys) => {
                    keys.keys().any(|key| !config.is_irrelevant(key, &[irrelevant::SHARED, family.irrelevant]))
                }
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => true,
            }),
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => true,
        };
        if let Some(value) = config.get("per_layer_config").filter(concerns) {
            return Err(config.unsupported("per_layer_config", value, "no family reads keys of single layers"));
        }
        let mut unknown_keys = config.unknown(&[irrelevant::SHARED, family.irrelevant]);
        unknown_keys.extend(unknown_quantization);
        unknown_keys.extend(text.unknown());
        let names = gguf::names(checkpoint, family, &model);
        let mut notes = config.notes();
        notes.extend(note);
        Ok(Self { family, names, model_type, model, quantization, unknown_keys, notes })
    }

    /// A layer that has experts.
    pub(super) fn block(&self, layer: usize) -> Result<&Block> {
        match self.model.layers.get(layer) {
            Some(Layer::Moe(block)) => Ok(block),
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

    pub(super) fn no_layer(&self, checkpoint: &Checkpoint) -> Error {
        loader::missing(checkpoint, format!("{} (N: {})", self.blocks("N"), self.moe_layers()))
    }

    /// Names of the block in a layer, for messages.
    fn blocks(&self, layer: &str) -> String {
        let names = self.names;
        let one = |part: &&str| format!("{}.{layer}.{part}.*", names.layers);
        let modules = names.modules.iter().filter(|module| !module.is_empty());
        modules.chain(names.parts.first()).map(one).collect::<Vec<_>>().join(" or ")
    }

    pub(super) fn site<'s>(
        &self,
        checkpoint: &Checkpoint,
        sites: &'s BTreeMap<usize, Vec<Site>>,
        layer: usize,
    ) -> Result<&'s Site> {
        match sites.get(&layer).map(Vec::as_slice) {
            Some([site]) => Ok(site),
            Some([one, other, ..]) => {
                let path = |site: &Site| format!("{}{}", site.layer, site.module);
                Err(Error::invalid(
                    "layer",
                    format!("{layer}, which is both {}.* and {}.*", path(one), path(other)),
                    "one module with experts a layer",
                    "remove the tensors that are not meant",
                ))
            }
            Some([]) | None => Err(loader::missing(checkpoint, self.blocks(&layer.to_string()))),
        }
    }

    pub(super) fn resolved(
        &self,
        checkpoint: &Checkpoint,
        request: &Request,
        layer: usize,
        source: Source,
    ) -> Result<Resolved> {
        let block = self.block(layer)?;
        let stored = source.stored(checkpoint, block)?;
        let mut notes = self.notes.clone();
        let activations = match source.is_router_only() {
            true => (ActivationQuant::None, ActivationQuant::None),
            false => self.activation_quant(request, &stored, &mut notes)?,
        };
        let spec = spec(request, block, &stored, activations);
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

    pub(super) fn unsupported_activations(&self, wanted: ActivationQuant, because: String) -> Error {
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
        let experts = &stored.experts;
        if let Some(quantization) = &self.quantization {
            self.agree(quantization, experts.format, notes)?;
        }
        let scheme = self.quantization.as_ref().and_then(|quantization| quantization.activations.clone());
        let scale_fmt = self.quantization.as_ref().and_then(|quantization| quantization.scale_fmt);
        let wanted = request.activations;
        let scale = match wanted {
            ActivationQuant::None => {
                let scheme = scheme.or_else(|| experts.input_scales.then(|| "input_scale".to_owned()));
                notes.extend(scheme.map(|scheme| {
                    format!(
                        "{scheme} of the checkpoint is not applied: \
                         activations stay unquantised (--activations none)"
                    )
                }));
                return Ok((ActivationQuant::None, ActivationQuant::None));
            }
            ActivationQuant::Dynamic { code: _, span: _, rule: _, scale } => Some(scale),
            ActivationQuant::Static { code: _ } => None,
        };
        if let Some(because) = refusal(wanted, experts) {
            return Err(self.unsupported_activations(wanted, format!("the experts are stored as {because}")));
        }
        match (scale_fmt, scale) {
            (Some(fmt), Some(ActivationScale::F32)) => notes.push(format!(
                "scale_fmt = {fmt} of the checkpoint is not applied to activations: their scales stay f32"
            )),
            (Some(_) | None, None)
            | (None, Some(ActivationScale::F32))
            | (Some(_) | None, Some(ActivationScale::F32CeilPow2 | ActivationScale::Ue8m0Packed)) => {}
        }
        let shared = match stored.shared.as_ref().and_then(|shared| Some((shared, refusal(wanted, shared)?))) {
            // Its scales are missing, which is no reason to do without.
            Some((shared, because)) if !shared.plain && scale.is_none() => {
                let because = format!("the shared expert is stored as {because}");
                return Err(self.unsupported_activations(wanted, because));
            }
            Some((_, because)) => {
                notes.push(format!("the shared expert is stored as {because}: what it reads stays unquantised"));
                ActivationQuant::None
            }
            None => wanted,
        };
        Ok((wanted, shared))
    }

    /// Refuses experts that are quantised in another way than `expert_dtype` says. That they are not quantised
    /// at all is a note: their dtype says it.
    fn agree(&self, quantization: &Quantization, experts: WeightFormat, notes: &mut Vec<String>) -> Result<()> {
        let Quantization { method, schemes: _, activations: _, scale_fmt: _, expert_dtype } = quantization;
        let stored = match experts {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => {
                notes.push(format!("quantization_config says {method}, the experts are stored as {experts:?}"));
                return Ok(());
            }
            WeightFormat::Fp8Block { block: _, scale: _ } | WeightFormat::Fp8Tensor | WeightFormat::Fp8Channel => "fp8",
            WeightFormat::Mxfp4 => "fp4",
            WeightFormat::Int8Channel
            | WeightFormat::Nvfp4
            | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ }
            | WeightFormat::Q8_0
            | WeightFormat::Q4K
            | WeightFormat::Q6K => "neither",
        };
        match expert_dtype {
            Some(dtype) if *dtype != stored => Err(Error::invalid(
                "expert_dtype",
                format!("{dtype}, with experts stored as {experts:?}"),
                "what the experts are stored as",
                "correct expert_dtype in config.json, or download the checkpoint again",
            )),
            Some(_) | None => Ok(()),
        }
    }
}

/// Why the codes of activations cannot meet weights that are stored in this way: how they are, and what is missing.
fn refusal(wanted: ActivationQuant, stored: &StoredMlp) -> Option<String> {
    let (fp8, int8, four_bits) = match stored.format {
        WeightFormat::Fp8Block { block: _, scale: _ } | WeightFormat::Fp8Tensor | WeightFormat::Fp8Channel => {
            (true, false, false)
        }
        WeightFormat::Int8Channel => (false, true, false),
        WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: false } => (false, false, true),
        WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => (false, false, true),
        WeightFormat::F32
        | WeightFormat::F16
        | WeightFormat::Bf16
        | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: true }
        | WeightFormat::Q8_0
        | WeightFormat::Q4K
        | WeightFormat::Q6K => (false, false, false),
    };
    let floats = match stored.format {
        WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => true,
        WeightFormat::F32
        | WeightFormat::F16
        | WeightFormat::Bf16
        | WeightFormat::Fp8Block { block: _, scale: _ }
        | WeightFormat::Fp8Tensor
        | WeightFormat::Fp8Channel
        | WeightFormat::Int8Channel
        | WeightFormat::Int4 { group: _, scale: _, zero_points: _, act_order: _ }
        | WeightFormat::Q8_0
        | WeightFormat::Q4K
        | WeightFormat::Q6K => false,
    };
    let (meets, needs) = match wanted {
        ActivationQuant::None => return None,
        ActivationQuant::Dynamic { code: ActivationCode::E4m3, span: _, rule: _, scale: _ } => {
            (fp8 || four_bits, "FP8 codes need weights of FP8, FP4 or, without an order of columns, INT4")
        }
        ActivationQuant::Dynamic { code: ActivationCode::Int8, span: _, rule: _, scale: _ } => {
            (int8 || (four_bits && !floats), "INT8 codes need weights of INT8 or, without an order of columns, INT4")
        }
        ActivationQuant::Static { code: ActivationCode::E4m3 } => {
            (fp8 && stored.input_scales, "static FP8 codes need FP8 weights with an input_scale")
        }
        ActivationQuant::Static { code: ActivationCode::Int8 } => {
            (int8 && stored.input_scales, "static INT8 codes need INT8 weights with an input_scale")
        }
    };
    (!meets).then(|| format!("{:?}; {needs}", stored.format))
}

/// The spec of a block as it is stored.
fn spec(
    request: &Request,
    block: &Block,
    stored: &Stored,
    (routed_quant, shared_quant): (ActivationQuant, ActivationQuant),
) -> MoeSpec {
    let Block {
        hidden_size,
        num_experts,
        top_k,
        router,
        method,
        renormalize,
        routed_scaling_factor,
        apply_routed_scale_to_output,
        per_expert_scale,
        weight_position,
        zero_experts,
        intermediate_size,
        activation,
        biases,
        shared,
        latent,
        expert_input,
        output_bias,
        output_norm,
    } = block;
    let mlp = |intermediate_size, activation, biases, stored: &StoredMlp, activation_quant| ExpertMlp {
        intermediate_size,
        activation,
        gate_up_layout: stored.rows,
        orientation: stored.orientation,
        gate_up_bias: biases,
        down_bias: biases,
        format: stored.format,
        activation_quant,
    };
    let shared = shared.as_ref().zip(stored.shared.as_ref()).map(|(shared, stored_mlp)| {
        let Shared { width, activation, biases, gate, combination } = *shared;
        SharedExperts {
            mlp: mlp(width, activation, biases, stored_mlp, shared_quant),
            gate: match gate {
                Gate::None => SharedGate::None,
                Gate::Sigmoid => SharedGate::Sigmoid { format: stored.shared_gate },
                Gate::Joint => SharedGate::Joint,
            },
            combination,
        }
    });
    MoeSpec {
        hidden_size: *hidden_size,
        num_experts: *num_experts,
        top_k: *top_k,
        router: match *router {
            RouterKind::Linear { input, bias, transform } => {
                Router::Linear { input, format: stored.router, bias, transform }
            }
            RouterKind::Mlp { state_size, rms_norm_eps, previous_state } => {
                Router::Mlp { state_size, rms_norm_eps, previous_state, format: stored.router }
            }
        },
        routing: Routing {
            method: method.clone(),
            renormalize: *renormalize,
            routed_scaling_factor: *routed_scaling_factor,
            apply_routed_scale_to_output: *apply_routed_scale_to_output,
            per_expert_scale: *per_expert_scale,
            weight_position: *weight_position,
            zero_experts: *zero_experts,
            nan_policy: NanPolicy::Zero,
        },
        experts: mlp(*intermediate_size, *activation, *biases, &stored.experts, routed_quant),
        shared,
        latent: latent.map(|(size, norm)| Latent { size, format: stored.latent, norm }),
        lora: None,
        expert_input: *expert_input,
        output_bias: *output_bias,
        output_norm: *output_norm,
        placement: Placement::All,
        shard: TensorShard::Whole,
        common_terms: crate::spec::CommonTerms::Here,
        entry: Entry::TokenMajor,
        precision: Precision::float32(request.input, request.output),
    }
}

pub(super) fn is_hash(block: &Block) -> bool {
    match &block.method {
        RoutingMethod::Hash { score: _, vocab_size: _ } => true,
        RoutingMethod::TopK { score: _, key: _, groups: _ }
        | RoutingMethod::TopKThenScore { score: _ }
        | RoutingMethod::JointNorm { num_shared: _, global_scale: _ }
        | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => false,
    }
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
