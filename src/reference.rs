//! The layer as its definition reads, token by token: the judge of every backend.
//!
//! Plain loops over the spec, the weights and `numerics` (and the list of what has not landed); it knows no
//! schedule and no kernel, so a fault of theirs cannot hide in it. Dot products are summed in f64 and rounded
//! to f32 once; scores, keys and weights are f32, as the models compute them, because ties depend on it.
//! A long file: one layer, from its input to its output.

use crate::error::{Error, Result};
use crate::numerics::{self, SpanScale};
use crate::spec::{
    ActivationQuant, ActivationRounding, ChosenScore, CombineOrder, CombineRounding, Entry, ExpertInput, ExpertMlp,
    GroupScore, Groups, Latent, LatentNorm, LogitTransform, Lora, LoraDelta, MoeSpec, NanPolicy, OutputNorm, Rounding,
    Router, RouterInput, Routing, RoutingMethod, ScaleSpan, Score, SelectionKey, SharedCombination, SharedExperts,
    SharedGate, Slot, WeightPosition, ZeroExpertKind, ZeroExperts,
};
use crate::support::{self, Scope};
use crate::weights::{LatentNormWeights, LoraWeights, Matrix, MlpWeights, MoeWeights, RouterMlpWeights, RouterWeights};

/// What enters a layer, widened to f32.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// [T, H].
    pub hidden_states: &'a [f32],
    /// `[T]`, for hash routing.
    pub token_ids: Option<&'a [u32]>,
    /// [T, outputs], if the caller gives the logits.
    pub logits: Option<&'a [f32]>,
    /// [T, H], if the experts read another input than the router.
    pub expert_hidden_states: Option<&'a [f32]>,
    /// [T, S], the previous layer's [`Routed::router_states`], if a state enters the router.
    pub router_states: Option<&'a [f32]>,
    /// `[T]`, -1 for none, if there are adapters.
    pub adapter_ids: Option<&'a [i32]>,
    /// `[slots]`, rows of each slot, for [`Entry::Batched`](crate::spec::Entry).
    pub counts: Option<&'a [u32]>,
    /// `[T]`, for a batched entry whose weights act inside of the experts.
    pub row_weights: Option<&'a [f32]>,
}

impl<'a> Inputs<'a> {
    /// What most layers read: hidden states and nothing else.
    pub fn of(hidden_states: &'a [f32]) -> Self {
        Self {
            hidden_states,
            token_ids: None,
            logits: None,
            expert_hidden_states: None,
            router_states: None,
            adapter_ids: None,
            counts: None,
            row_weights: None,
        }
    }
}

/// What the router decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// [T, outputs], after the logit transform.
    pub logits: Vec<f32>,
    /// [T, k], descending key.
    pub topk_ids: Vec<i32>,
    /// [T, k].
    pub topk_weights: Vec<f32>,
    /// [T, n], the shares of joint normalisation, else empty.
    pub shared_weights: Vec<f32>,
    /// [T, S], the state of a [`Router::Mlp`] for the next layer, else empty.
    pub router_states: Vec<f32>,
}

/// What leaves a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The router's part.
    pub routed: Routed,
    /// [T, H], rounded to the output type and widened again.
    pub output: Vec<f32>,
}

/// Whether the reference computes a layer.
///
/// # Errors
/// An invalid spec, or the part of it that the reference lacks.
pub fn supports(spec: &MoeSpec) -> Result<()> {
    spec.validate()?;
    Ok(support::landed("reference", spec, Scope::Layer)?)
}

/// Computes ids and weights.
///
/// # Errors
/// An invalid spec, weights or inputs that do not fit it, a token id outside of the hash table, or
/// a part of the spec that the reference lacks.
pub fn route(spec: &MoeSpec, router: &RouterWeights<'_>, inputs: Inputs<'_>) -> Result<Routed> {
    spec.validate()?;
    support::landed("reference", spec, Scope::Routing)?;
    spec.expect_routing()?;
    router.check(spec)?;
    let tokens = token_count(spec, inputs.hidden_states)?;
    let mut routed = Routed {
        logits: Vec::with_capacity(tokens * spec.router_outputs()),
        topk_ids: Vec::with_capacity(tokens * spec.top_k),
        topk_weights: Vec::with_capacity(tokens * spec.top_k),
        shared_weights: vec![],
        router_states: vec![],
    };
    for token in 0..tokens {
        let x = &inputs.hidden_states[token * spec.hidden_size..][..spec.hidden_size];
        let logits = logits(spec, router, &inputs, token, x, &mut routed.router_states)?;
        let token_id = match inputs.token_ids {
            None => None,
            Some(ids) => Some(*ids.get(token).ok_or_else(|| {
                Error::invalid("token_ids", ids.len(), format!("{tokens}, one a token"), "give the id of each token")
            })?),
        };
        let Choice { ids, weights, shares } = choose(spec, router, &logits, token_id)?;
        routed.logits.extend_from_slice(&logits);
        routed.topk_ids.extend(ids.iter().map(|&id| id as i32));
        routed.topk_weights.extend(weights);
        routed.shared_weights.extend(shares);
    }
    Ok(routed)
}

/// Computes the layer.
///
/// # Errors
/// As [`route`].
pub fn layer(spec: &MoeSpec, weights: &MoeWeights<'_>, inputs: Inputs<'_>) -> Result<Layer> {
    let routed = match spec.entry {
        Entry::TokenMajor => route(spec, &weights.router, inputs)?,
        Entry::Batched { capacity: _ } => Routed {
            logits: vec![],
            topk_ids: vec![],
            topk_weights: inputs.row_weights.unwrap_or_default().to_vec(),
            shared_weights: vec![],
            router_states: vec![],
        },
    };
    let output = experts(spec, weights, inputs, &routed)?;
    Ok(Layer { routed, output })
}

/// Computes everything behind ids and weights, which may be the caller's: ids of selectable outputs, or
/// -1 for no contribution; any other makes the token's row NaN. So does an id of an adapter that is none. With
/// [`Entry::Batched`](crate::spec::Entry) there are no ids, and weights only where they act inside of the experts.
///
/// # Errors
/// As [`route`], and ids or weights that are not [T, k].
pub fn experts(spec: &MoeSpec, weights: &MoeWeights<'_>, inputs: Inputs<'_>, routed: &Routed) -> Result<Vec<f32>> {
    spec.validate()?;
    support::landed("reference", spec, Scope::Layer)?;
    weights.check(spec)?;
    let tokens = token_count(spec, inputs.hidden_states)?;
    let Routed { logits: _, topk_ids, topk_weights, shared_weights, router_states: _ } = routed;
    let shares = if spec.entry.is_batched() { 0 } else { spec.joint_shares() };
    let [ids, row_weights] = match spec.entry {
        Entry::TokenMajor => [spec.top_k, spec.top_k],
        Entry::Batched { capacity: _ } => [0, usize::from(spec.routing.weight_position != WeightPosition::Output)],
    };
    for (field, found, width) in [
        ("topk_ids", topk_ids.len(), ids),
        ("topk_weights", topk_weights.len(), row_weights),
        ("shared_weights", shared_weights.len(), shares),
        ("adapter_ids", inputs.adapter_ids.map_or(0, <[i32]>::len), usize::from(spec.lora.is_some())),
    ] {
        if found != tokens * width {
            let expected = format!("{tokens} rows of {width}");
            return Err(Error::invalid(field, format!("{found} values"), expected, "give one row a token"));
        }
    }
    let read = match (spec.expert_input, inputs.expert_hidden_states) {
        (ExpertInput::Hidden, _) => inputs.hidden_states,
        (ExpertInput::Separate, Some(rows)) if rows.len() == inputs.hidden_states.len() => rows,
        (ExpertInput::Separate, found) => {
            return Err(Error::invalid(
                "expert_hidden_states",
                found.map_or("none".into(), |rows| format!("{} values", rows.len())),
                format!("{} values", inputs.hidden_states.len()),
                "give the rows that the experts read",
            ));
        }
    };
    let chosen = match spec.entry {
        Entry::TokenMajor => chosen(spec, inputs, routed, tokens),
        Entry::Batched { capacity } => batched(spec, inputs, routed, tokens, capacity)?,
    };
    let largest = Largest::find(spec, weights, read, &chosen);
    let mut output = Vec::with_capacity(read.len());
    for ((token, x), chosen) in read.chunks_exact(spec.hidden_size).enumerate().zip(chosen) {
        let shares = &shared_weights[token * shares..(token + 1) * shares];
        let mut row = token_output(spec, weights, x, &chosen, shares, &largest);
        if let (Some(OutputNorm { eps }), Some(weight)) = (spec.output_norm, &weights.output_norm) {
            let sum: Vec<f32> = row.iter().map(|&value| value as f32).collect();
            row = multiply(&rms_norm(&sum, eps), weight).into_iter().map(f64::from).collect();
        }
        output.extend(row.iter().map(|&value| numerics::round_to(spec.precision.output, value as f32)));
    }
    Ok(output)
}

/// The codes [T, width] and scales [T, spans] of what the routed experts read, where each row is quantised once
/// a token and by itself.
///
/// # Errors
/// As [`experts`], and a spec that quantises nothing, or otherwise.
pub fn input_codes(spec: &MoeSpec, weights: &MoeWeights<'_>, inputs: Inputs<'_>) -> Result<(Vec<u8>, Vec<f32>)> {
    spec.validate()?;
    weights.check(spec)?;
    token_count(spec, inputs.hidden_states)?;
    let by_token = match spec.experts.activation_quant {
        ActivationQuant::Dynamic { code: _, span: ScaleSpan::Group(_) | ScaleSpan::Token, rule: _, scale: _ } => {
            spec.routing.weight_position != WeightPosition::Input
        }
        ActivationQuant::None
        | ActivationQuant::Static { code: _ }
        | ActivationQuant::Dynamic { code: _, span: ScaleSpan::Tensor, rule: _, scale: _ } => false,
    };
    if !by_token {
        let found = format!("{:?}", spec.experts.activation_quant);
        let expected = "Dynamic by group or token, without routing weights on the input";
        return Err(Error::invalid("experts.activation_quant", found, expected, "ask for no codes"));
    }
    let rows = inputs.expert_hidden_states.unwrap_or(inputs.hidden_states).chunks_exact(spec.hidden_size);
    let mut all = (vec![], vec![]);
    for x in rows {
        let row = Entering::of(expert_input(spec, weights, x), spec.experts.activation_quant, None, f32::NAN);
        all.0.extend(row.codes);
        all.1.extend(row.spans.map(|(_, scales)| scales).unwrap_or_default());
    }
    Ok(all)
}

/// What a slot of a token's row asks for.
#[derive(Debug, Clone, Copy)]
struct Chosen {
    /// For the order of the sum.
    id: i32,
    weight: f32,
    from: From,
    /// Its adapter.
    adapter: Option<usize>,
}

#[derive(Debug, Clone, Copy)]
enum From {
    /// A slot.
    Expert(usize),
    ZeroExpert,
    /// An expert that is elsewhere, or -1.
    Nobody,
    /// An id that nobody has: NaN.
    Fault,
}

/// What each token's ids mean on this device.
fn chosen(spec: &MoeSpec, inputs: Inputs<'_>, routed: &Routed, tokens: usize) -> Vec<Vec<Chosen>> {
    let one = |row: usize| {
        let (id, token) = (routed.topk_ids[row], row / spec.top_k);
        let from = match usize::try_from(id) {
            Err(_) if id == -1 => From::Nobody,
            Ok(id) if id < spec.num_experts => match spec.placement.slot(id, token) {
                Slot::Here(slot) => From::Expert(slot),
                Slot::Elsewhere => From::Nobody,
                Slot::Missing => From::Fault,
            },
            Ok(id) if id < spec.selectable() => match spec.adds_common_terms() {
                true => From::ZeroExpert,
                false => From::Nobody,
            },
            Ok(_) | Err(_) => From::Fault,
        };
        Chosen { id, weight: routed.topk_weights[row], from, adapter: None }.adapted(spec, inputs, token)
    };
    (0..tokens).map(|token| (token * spec.top_k..(token + 1) * spec.top_k).map(one).collect()).collect()
}

/// The slot of each row of a batched entry.
fn batched(
    spec: &MoeSpec,
    inputs: Inputs<'_>,
    routed: &Routed,
    rows: usize,
    capacity: usize,
) -> Result<Vec<Vec<Chosen>>> {
    let counts = inputs.counts.unwrap_or_default();
    if counts.len() != spec.num_slots() || rows != counts.len() * capacity {
        return Err(Error::invalid(
            "counts",
            format!("{} counts, {rows} rows", counts.len()),
            format!("{} counts, {capacity} rows each", spec.num_slots()),
            "give [slots, capacity, hidden_size] and a count for each slot",
        ));
    }
    let one = |row: usize| {
        let slot = row / capacity;
        let weight = routed.topk_weights.get(row).copied().unwrap_or(1.0);
        let one = Chosen { id: slot as i32, weight, from: From::Expert(slot), adapter: None };
        one.adapted(spec, inputs, row)
    };
    let exists = |row: usize| row % capacity < counts[row / capacity] as usize;
    Ok((0..rows).map(|row| if exists(row) { vec![one(row)] } else { vec![] }).collect())
}

impl Chosen {
    /// With the adapter of its token.
    fn adapted(mut self, spec: &MoeSpec, inputs: Inputs<'_>, token: usize) -> Self {
        if let (Some(Lora { num_adapters, rank: _, format: _, delta: _ }), Some(ids)) = (&spec.lora, inputs.adapter_ids)
        {
            match (usize::try_from(ids[token]), self.from) {
                (Ok(adapter), _) if adapter < *num_adapters => self.adapter = Some(adapter),
                (Err(_), _) if ids[token] == -1 => {}
                // An adapter that nobody has; who asks for no expert asks for no adapter.
                (_, From::Expert(_)) => self.from = From::Fault,
                (_, From::ZeroExpert | From::Nobody | From::Fault) => {}
            }
        }
        self
    }
}

/// One token's row before the norm on it and the rounding to the output type.
fn token_output(
    spec: &MoeSpec,
    weights: &MoeWeights<'_>,
    x: &[f32],
    chosen: &[Chosen],
    shares: &[f32],
    largest: &Largest,
) -> Vec<f64> {
    let precision = &spec.precision;
    // Products and partial sums are f64, or of type T at every step.
    let step = |value: f64| match precision.combine {
        CombineRounding::F32 | CombineRounding::WeightedRows => value,
        CombineRounding::EveryStep => f64::from(numerics::round_to(precision.model, value as f32)),
    };
    let weighted = |weight: f32, value: f32| match precision.combine {
        CombineRounding::F32 => f64::from(weight) * f64::from(value),
        CombineRounding::WeightedRows => f64::from(numerics::round_to(precision.model, weight * value)),
        CombineRounding::EveryStep => {
            f64::from(numerics::round_to(precision.model, weight * numerics::round_to(precision.model, value)))
        }
    };
    let mut chosen = chosen.to_vec();
    match precision.combine_order {
        CombineOrder::Slot => {}
        CombineOrder::Expert => chosen.sort_by_key(|one| one.id),
    }
    let entering = expert_input(spec, weights, x);
    let mut sum = vec![0f64; entering.len()];
    for one in chosen {
        let weight = one.weight;
        let (row, on_output) = match (one.from, spec.routing.zero_experts) {
            (From::Nobody, _) => continue,
            (From::Fault, _) => {
                sum.fill(f64::NAN);
                continue;
            }
            (From::Expert(slot), _) => {
                let row = ExpertRow::routed(spec, &entering, &one, slot, weights);
                let row = mlp(spec, &spec.experts, &weights.experts[slot], row, &largest.experts);
                let row = match (&spec.latent, weights.latent.as_ref().map(|latent| &latent.norm)) {
                    (
                        Some(Latent { size: _, format: _, norm: LatentNorm::PreAndPost { pre_eps: _, post_eps } }),
                        Some(LatentNormWeights::PreAndPost { pre: _, post }),
                    ) => rms_norm(&multiply(&row, post), *post_eps),
                    (Some(_) | None, _) => row,
                };
                let on_output = match spec.routing.weight_position {
                    WeightPosition::Output => weight,
                    WeightPosition::Input | WeightPosition::BeforeDown => 1.0,
                };
                (row, on_output)
            }
            (From::ZeroExpert, Some(ZeroExperts { count: _, kind: ZeroExpertKind::Identity })) => {
                (entering.clone(), weight)
            }
            (From::ZeroExpert, Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) | None) => continue,
        };
        for (sum, value) in sum.iter_mut().zip(row) {
            *sum = step(*sum + weighted(on_output, value));
        }
    }
    if spec.routing.apply_routed_scale_to_output {
        for sum in &mut sum {
            *sum = step(*sum * f64::from(spec.routing.routed_scaling_factor));
        }
    }
    if let (Some(Latent { size: _, format: _, norm }), Some(latent)) = (&spec.latent, &weights.latent) {
        let reduced: Vec<f32> = sum.iter().map(|&value| value as f32).collect();
        let reduced = match (norm, &latent.norm) {
            (LatentNorm::Reduced { eps }, LatentNormWeights::Reduced(weight)) => {
                multiply(&rms_norm(&reduced, *eps), weight)
            }
            (
                LatentNorm::None | LatentNorm::Reduced { eps: _ } | LatentNorm::PreAndPost { pre_eps: _, post_eps: _ },
                _,
            ) => reduced,
        };
        sum = project(&latent.up, &reduced).into_iter().map(|value| step(f64::from(value))).collect();
    }
    for (sum, bias) in sum.iter_mut().zip(weights.output_bias.iter().flatten()) {
        *sum = step(*sum + f64::from(*bias));
    }
    if let Some(SharedExperts { mlp: shape, gate, combination }) = &spec.shared {
        for (index, shared) in weights.shared.iter().enumerate() {
            let factor = match (gate, &weights.shared_gate) {
                (SharedGate::Sigmoid { format: _ }, Some(row)) => numerics::sigmoid(dot(row, 0, x)),
                (SharedGate::Joint, _) => shares[index],
                (SharedGate::Sigmoid { format: _ }, None) | (SharedGate::None, _) => 1.0,
            };
            let factor = step(f64::from(factor)) as f32;
            let row = mlp(spec, shape, shared, ExpertRow::of(x), &largest.shared);
            for (sum, value) in sum.iter_mut().zip(row) {
                // What the roundings of a weighted row are to the routed experts, they are not to this one,
                // unless every step is rounded.
                let term = step(f64::from(factor) * step(f64::from(value)));
                *sum = step(*sum + term);
            }
        }
        let average = match combination {
            SharedCombination::Sum => 1.0,
            SharedCombination::Average => 0.5,
        };
        for sum in &mut sum {
            *sum = step(*sum * average);
        }
    }
    sum
}

/// The row that the routed experts read.
fn expert_input(spec: &MoeSpec, weights: &MoeWeights<'_>, x: &[f32]) -> Vec<f32> {
    match (&spec.latent, &weights.latent) {
        (Some(Latent { size: _, format: _, norm }), Some(latent)) => {
            let z = project(&latent.down, x);
            match (norm, &latent.norm) {
                (LatentNorm::PreAndPost { pre_eps, post_eps: _ }, LatentNormWeights::PreAndPost { pre, post: _ }) => {
                    multiply(&rms_norm(&z, *pre_eps), pre)
                }
                (
                    LatentNorm::None
                    | LatentNorm::Reduced { eps: _ }
                    | LatentNorm::PreAndPost { pre_eps: _, post_eps: _ },
                    _,
                ) => z,
            }
        }
        (Some(_) | None, _) => x.to_vec(),
    }
}

/// `x / sqrt(mean x^2 + eps)`.
fn rms_norm(x: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().map(|&x| (f64::from(x) * factor) as f32).collect()
}

fn multiply(x: &[f32], weight: &[f32]) -> Vec<f32> {
    x.iter().zip(weight).map(|(x, weight)| x * weight).collect()
}

/// `W x`.
fn project(matrix: &Matrix<'_>, x: &[f32]) -> Vec<f32> {
    (0..matrix.shape()[0]).map(|row| dot(matrix, row, x)).collect()
}

fn token_count(spec: &MoeSpec, hidden_states: &[f32]) -> Result<usize> {
    if !hidden_states.len().is_multiple_of(spec.hidden_size) {
        return Err(Error::invalid(
            "hidden_states",
            format!("{} values", hidden_states.len()),
            format!("whole rows of {}", spec.hidden_size),
            "give [tokens, hidden_size]",
        ));
    }
    Ok(hidden_states.len() / spec.hidden_size)
}

fn dot(matrix: &Matrix<'_>, row: usize, x: &[f32]) -> f32 {
    x.iter().enumerate().map(|(col, &x)| f64::from(matrix.get(row, col)) * f64::from(x)).sum::<f64>() as f32
}

/// The logits of one token, rounded and transformed; a router with state appends it to `states`.
fn logits(
    spec: &MoeSpec,
    router: &RouterWeights<'_>,
    inputs: &Inputs<'_>,
    token: usize,
    x: &[f32],
    states: &mut Vec<f32>,
) -> Result<Vec<f32>> {
    let outputs = spec.router_outputs();
    let none = LogitTransform::None;
    let lacks = |what: &'static str| Error::invalid("router", what, "the weights of its spec", "give them");
    let (raw, transform): (Vec<f32>, _) = match &spec.router {
        Router::Linear { input, format: _, bias: _, transform } => {
            let weight = router.weight.as_ref().ok_or_else(|| lacks("no matrix"))?;
            let x = match (input, &router.input_scale) {
                (RouterInput::RmsNormScaled { eps }, Some(scale)) => {
                    let root = 1.0 / (spec.hidden_size as f32).sqrt();
                    multiply(&rms_norm(x, *eps), scale).iter().map(|x| x * root).collect()
                }
                (RouterInput::RmsNormScaled { eps: _ }, None) => return Err(lacks("no scale")),
                (RouterInput::Hidden, _) => x.to_vec(),
            };
            let bias = |output| router.bias.as_ref().map_or(0.0, |bias| bias[output]);
            ((0..outputs).map(|output| dot(weight, output, &x) + bias(output)).collect(), *transform)
        }
        Router::Mlp { state_size, rms_norm_eps, previous_state, format: _ } => {
            let RouterMlpWeights { down, down_bias, states_scale, norm, fc1, fc1_bias, fc2, fc2_bias, out } =
                router.mlp.as_ref().ok_or_else(|| lacks("no MLP"))?;
            let add = |x: &[f32], y: &[f32]| -> Vec<f32> { x.iter().zip(y).map(|(x, y)| x + y).collect() };
            let mut state = add(&project(down, x), down_bias);
            if *previous_state {
                let previous =
                    inputs.router_states.and_then(|all| all.get(token * state_size..(token + 1) * state_size));
                let previous = previous.ok_or_else(|| {
                    Error::invalid("router_states", "too few", "[tokens, state_size]", "give the previous layer's")
                })?;
                state =
                    add(&state, &multiply(previous, states_scale.as_ref().ok_or_else(|| lacks("no states_scale"))?));
            }
            states.extend_from_slice(&state);
            let gelu = |x: Vec<f32>| -> Vec<f32> { x.into_iter().map(numerics::gelu_erf).collect() };
            let z = multiply(&rms_norm(&state, *rms_norm_eps), norm);
            let z = gelu(add(&project(fc1, &z), fc1_bias));
            let z = gelu(add(&project(fc2, &z), fc2_bias));
            (project(out, &z), none)
        }
        Router::Given { transform } => {
            let row = inputs.logits.and_then(|logits| logits.get(token * outputs..(token + 1) * outputs));
            let row = row.ok_or_else(|| {
                Error::invalid("logits", "too few", "[tokens, outputs]", "give the logits of each token")
            })?;
            (row.to_vec(), *transform)
        }
    };
    let rounded = spec.precision.rounded(spec.precision.router_gemm);
    let transformed = |l: f32| match transform {
        LogitTransform::None => l,
        LogitTransform::SoftCap { cap } => cap * (l / cap).tanh(),
        LogitTransform::Multiply { factor } => l * factor,
    };
    Ok(raw.into_iter().map(|l| transformed(numerics::round_to(rounded, l))).collect())
}

/// What one token is routed to.
struct Choice {
    /// In descending order of the key.
    ids: Vec<usize>,
    weights: Vec<f32>,
    shares: Vec<f32>,
}

fn choose(spec: &MoeSpec, router: &RouterWeights<'_>, logits: &[f32], token_id: Option<u32>) -> Result<Choice> {
    let Routing {
        method,
        renormalize,
        routed_scaling_factor,
        apply_routed_scale_to_output,
        per_expert_scale: _,
        weight_position: _,
        zero_experts,
        nan_policy,
    } = &spec.routing;
    let not_finite = match nan_policy {
        NanPolicy::Zero => 0.0,
        NanPolicy::Propagate => f32::NAN,
    };
    let selectable = spec.selectable();
    let bias = |e: usize| router.selection_bias.as_ref().map_or(0.0, |bias| bias[e]);
    let everyone = vec![true; selectable];
    let mut shares = vec![];
    let (ids, mut weights): (Vec<usize>, Vec<f32>) = match method {
        RoutingMethod::TopK { score, key, groups } => {
            let scores = scores(*score, logits);
            // `None` sorts below every number: a score that is not finite is chosen last.
            let keys: Vec<Option<f32>> = (0..selectable)
                .map(|e| {
                    let value = match key {
                        SelectionKey::Score => scores[e],
                        SelectionKey::ScorePlusBias => scores[e] + bias(e),
                        SelectionKey::LogitPlusBias => logits[e] + bias(e),
                    };
                    (scores[e].is_finite() && !value.is_nan()).then_some(value)
                })
                .collect();
            let allowed = match groups {
                None => everyone,
                Some(groups) => allowed_by_group(*groups, &scores, &keys),
            };
            let ids = largest(&keys, &allowed, spec.top_k);
            let weights = ids.iter().map(|&e| if keys[e].is_some() { scores[e] } else { not_finite }).collect();
            (ids, weights)
        }
        RoutingMethod::TopKThenScore { score } => {
            // Where the score of a logit alone is finite: exp(-inf) = 0, sigmoid of both infinities is 0 or 1.
            let legal = |l: f32| match score {
                ChosenScore::Softmax => !l.is_nan() && l < f32::INFINITY,
                ChosenScore::Sigmoid => !l.is_nan(),
            };
            let keys: Vec<Option<f32>> = logits.iter().map(|&l| legal(l).then_some(l)).collect();
            let ids = largest(&keys, &everyone, spec.top_k);
            let chosen: Vec<Option<f32>> = ids.iter().map(|&e| keys[e]).collect();
            let max = chosen.iter().flatten().fold(f32::MIN, |max, &l| if l > max { l } else { max });
            let sum: f64 = chosen.iter().flatten().map(|&l| f64::from((l - max).exp())).sum();
            let weight = |l: &Option<f32>| match (l, score) {
                (None, ChosenScore::Softmax | ChosenScore::Sigmoid) => not_finite,
                // Only -inf was chosen: no weight at all.
                (Some(_), ChosenScore::Softmax) if sum == 0.0 => 0.0,
                (Some(l), ChosenScore::Softmax) => (l - max).exp() / sum as f32,
                (Some(l), ChosenScore::Sigmoid) => numerics::sigmoid(*l),
            };
            (ids, chosen.iter().map(weight).collect())
        }
        RoutingMethod::Hash { score, vocab_size } => {
            let (Some(table), Some(token_id)) = (&router.tid2eid, token_id) else {
                return Err(Error::invalid("token_ids", "none", "one a token", "hash routing needs the token ids"));
            };
            let token_id = token_id as usize;
            if token_id >= *vocab_size {
                return Err(Error::invalid(
                    "token_ids",
                    token_id,
                    format!("ids below {vocab_size}"),
                    "the token is outside of the hash table",
                ));
            }
            let scores = scores(*score, logits);
            let ids: Vec<usize> =
                table[token_id * spec.top_k..(token_id + 1) * spec.top_k].iter().map(|&id| id as usize).collect();
            let weights = ids.iter().map(|&e| if scores[e].is_finite() { scores[e] } else { not_finite }).collect();
            (ids, weights)
        }
        RoutingMethod::JointNorm { num_shared: _, global_scale: _ } => {
            let keys: Vec<Option<f32>> = (0..selectable)
                .map(|e| Some(numerics::sigmoid(logits[e]) + bias(e)).filter(|_| !logits[e].is_nan()))
                .collect();
            let ids = largest(&keys, &everyone, spec.top_k);
            // log sigmoid of the chosen, then of the shared; a NaN takes no part.
            let logs: Vec<Option<f32>> = ids
                .iter()
                .copied()
                .chain(selectable..logits.len())
                .map(|e| Some(numerics::log_sigmoid(logits[e])).filter(|log| !log.is_nan()))
                .collect();
            let max = logs.iter().flatten().fold(f32::MIN, |max, &log| if log > max { log } else { max });
            let sum: f64 = logs.iter().flatten().map(|&log| f64::from((log - max).exp())).sum();
            let spoiled = *nan_policy == NanPolicy::Propagate && logs.contains(&None);
            let global_scale = router.global_scale.unwrap_or(1.0);
            let mut weights: Vec<f32> = logs
                .iter()
                .map(|log| match log {
                    _ if spoiled => f32::NAN,
                    None => 0.0,
                    // Only -inf: no weight at all.
                    Some(_) if sum == 0.0 => 0.0,
                    Some(log) => (log - max).exp() / sum as f32 * global_scale,
                })
                .collect();
            shares = weights.split_off(ids.len()).iter().map(|share| share * routed_scaling_factor).collect();
            (ids, weights)
        }
        RoutingMethod::Sparsemixer { router_jitter_noise } => {
            let legal = |l: f32| !l.is_nan() && l < f32::INFINITY;
            let keys: Vec<Option<f32>> = logits.iter().map(|&l| legal(l).then_some(l)).collect();
            let ids = largest(&keys, &everyone, spec.top_k);
            let weights = ids.iter().enumerate().map(|(pass, &chosen)| {
                let Some(max) = keys[chosen] else { return not_finite };
                let near = |l: f32| {
                    let width = if l.abs() > max { l.abs() } else { max };
                    // NaN (0 / 0, -inf - -inf) is no distance.
                    let far = (max - l) / width > 2.0 * router_jitter_noise;
                    !far && l > f32::NEG_INFINITY
                };
                let others = (0..selectable).filter(|e| !ids[..pass].contains(e)).filter_map(|e| keys[e]);
                let sum: f64 = others.filter(|l| near(*l)).map(|l| f64::from((l - max).exp())).sum();
                // Only -inf is left: no weight at all.
                if sum == 0.0 { 0.0 } else { (1.0 / sum) as f32 }
            });
            let weights = weights.collect();
            (ids, weights)
        }
    };
    if let Some(rule) = renormalize {
        let denominator = numerics::denominator(*rule, &weights);
        let spoiled = weights.iter().any(|weight| weight.is_nan());
        for weight in &mut weights {
            *weight = if spoiled {
                f32::NAN
            } else if denominator == 0.0 {
                // No weight at all (every score 0): 0 rather than 0/0.
                0.0
            } else {
                *weight / denominator
            };
        }
    }
    let rounded = spec.precision.rounded(spec.precision.routing_weights);
    for (id, weight) in ids.iter().zip(&mut weights) {
        // A zero expert has no scale of its own.
        if let Some(scale) = router.per_expert_scale.as_ref().and_then(|scale| scale.get(*id)) {
            *weight *= scale;
        }
        if !apply_routed_scale_to_output {
            *weight *= routed_scaling_factor;
        }
        match zero_experts {
            Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) if *id >= spec.num_experts => *weight = 0.0,
            Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip | ZeroExpertKind::Identity }) | None => {}
        }
        *weight = numerics::round_to(rounded, *weight);
    }
    for share in &mut shares {
        *share = numerics::round_to(rounded, *share);
    }
    Ok(Choice { ids, weights, shares })
}

fn scores(score: Score, logits: &[f32]) -> Vec<f32> {
    match score {
        Score::Softmax => {
            // A NaN must reach every score: `fold` with `>` alone would lose it.
            let max = logits.iter().fold(f32::NEG_INFINITY, |max, &l| if l > max || l.is_nan() { l } else { max });
            let sum: f64 = logits.iter().map(|l| f64::from((l - max).exp())).sum();
            logits.iter().map(|l| (l - max).exp() / sum as f32).collect()
        }
        Score::Sigmoid => logits.iter().map(|&l| numerics::sigmoid(l)).collect(),
        Score::SqrtSoftplus => logits.iter().map(|&l| numerics::sqrt_softplus(l)).collect(),
        Score::Identity => logits.to_vec(),
    }
}

/// The `count` largest keys among the allowed, ties to the lower id, `None` last.
fn largest(keys: &[Option<f32>], allowed: &[bool], count: usize) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..keys.len()).filter(|&e| allowed[e]).collect();
    // Stable, so equal keys stay in order of id; no key is NaN, and -0 equals +0.
    ids.sort_by(|&a, &b| keys[b].partial_cmp(&keys[a]).unwrap_or(std::cmp::Ordering::Equal));
    ids.truncate(count);
    ids
}

/// Which experts stand in one of the best groups. Membership, not a value: no key can imitate it.
fn allowed_by_group(groups: Groups, scores: &[f32], keys: &[Option<f32>]) -> Vec<bool> {
    let Groups { n_group, topk_group, score } = groups;
    let size = keys.len() / n_group;
    let judged: Vec<Option<f32>> = (0..n_group)
        .map(|group| {
            let members = group * size..(group + 1) * size;
            let by_score = |e: usize| scores[e].is_finite().then_some(scores[e]);
            let (values, take): (Vec<Option<f32>>, usize) = match score {
                GroupScore::Top2SumOfKey => (keys[members].to_vec(), 2),
                GroupScore::Top2SumOfScore => (members.map(by_score).collect(), 2),
                GroupScore::MaxOfScore => (members.map(by_score).collect(), 1),
            };
            let best = largest(&values, &vec![true; size], take);
            best.iter().map(|&e| values[e]).sum::<Option<f32>>().filter(|sum| !sum.is_nan())
        })
        .collect();
    let kept = largest(&judged, &vec![true; n_group], topk_group);
    (0..keys.len()).map(|e| kept.contains(&(e / size))).collect()
}

/// The largest magnitudes of all rows that enter an MLP's GEMMs, where they share one scale.
#[derive(Debug, Clone, Copy, PartialEq)]
struct TensorAmax {
    input: f32,
    hidden: f32,
}

/// Those of the routed and of the shared experts.
struct Largest {
    experts: TensorAmax,
    shared: TensorAmax,
}

impl Largest {
    fn find(spec: &MoeSpec, weights: &MoeWeights<'_>, rows: &[f32], chosen: &[Vec<Chosen>]) -> Self {
        let none = TensorAmax { input: f32::NAN, hidden: f32::NAN };
        let mut largest = Self { experts: none, shared: none };
        let rows = || rows.chunks_exact(spec.hidden_size);
        let position = spec.routing.weight_position;
        if spec.experts.activation_quant.shares_scale() {
            let mlp = &spec.experts;
            let mut inputs = vec![];
            let mut hidden = vec![];
            // The second scale follows from activations of rows that the first has quantised.
            for find_hidden in [false, true] {
                for (x, chosen) in rows().zip(chosen) {
                    let entering = expert_input(spec, weights, x);
                    for one in chosen {
                        let From::Expert(slot) = one.from else { continue };
                        let row = ExpertRow::routed(spec, &entering, one, slot, weights);
                        match find_hidden {
                            false => inputs.extend(row.weighted(spec)),
                            true => {
                                hidden.extend(hidden_row(spec, mlp, &weights.experts[slot], row, &largest.experts));
                            }
                        }
                    }
                    // Rows that no weight has touched are quantised once a token, chosen experts or not.
                    if !find_hidden && position != WeightPosition::Input && !spec.entry.is_batched() {
                        inputs.extend(entering);
                    }
                }
                largest.experts.input = numerics::largest_magnitude(&inputs);
            }
            largest.experts.hidden = numerics::largest_magnitude(&hidden);
        }
        if let Some(SharedExperts { mlp, gate: _, combination: _ }) =
            spec.shared.as_ref().filter(|shared| shared.mlp.activation_quant.shares_scale())
        {
            largest.shared.input = rows().map(numerics::largest_magnitude).fold(0.0, larger);
            let hidden = rows().flat_map(|x| weights.shared.iter().map(move |shared| (x, shared)));
            let hidden = hidden.map(|(x, shared)| {
                numerics::largest_magnitude(hidden_row(spec, mlp, shared, ExpertRow::of(x), &largest.shared))
            });
            largest.shared.hidden = hidden.fold(0.0, larger);
        }
        largest
    }
}

fn larger(a: f32, b: f32) -> f32 {
    numerics::largest_magnitude([a, b])
}

/// A row as a GEMM reads it.
struct Entering {
    /// Numbers, or the values of codes.
    values: Vec<f32>,
    /// The codes, if they are some.
    codes: Vec<u8>,
    /// Columns of a span, and the scale of each, if they are codes.
    spans: Option<(usize, Vec<f32>)>,
}

impl Entering {
    /// `fixed` and `amax` are the scale and the largest magnitude that the quantisation takes from outside.
    fn of(values: Vec<f32>, quant: ActivationQuant, fixed: Option<f32>, amax: f32) -> Self {
        let (code, width) = match quant {
            ActivationQuant::None => return Self { values, codes: vec![], spans: None },
            ActivationQuant::Dynamic { code, span: ScaleSpan::Group(columns), rule: _, scale: _ } => (code, columns),
            ActivationQuant::Dynamic { code, span: ScaleSpan::Token | ScaleSpan::Tensor, rule: _, scale: _ }
            | ActivationQuant::Static { code } => (code, values.len()),
        };
        let span = |values: &[f32]| match quant {
            ActivationQuant::None | ActivationQuant::Static { code: _ } => SpanScale::fixed(fixed.unwrap_or(f32::NAN)),
            ActivationQuant::Dynamic { code, span: ScaleSpan::Group(_) | ScaleSpan::Token, rule, scale } => {
                SpanScale::dynamic(code, rule, scale, numerics::largest_magnitude(values))
            }
            ActivationQuant::Dynamic { code, span: ScaleSpan::Tensor, rule, scale } => {
                SpanScale::dynamic(code, rule, scale, amax)
            }
        };
        let mut scales = vec![];
        let mut codes = vec![];
        for values in values.chunks(width) {
            let span = span(values);
            scales.push(span.scale);
            codes.extend(values.iter().map(|value| span.encode(code, *value)));
        }
        let values = codes.iter().map(|byte| numerics::decode_activation(code, *byte)).collect();
        Self { values, codes, spans: Some((width, scales)) }
    }

    /// `W x`, row `row`: of codes the sum of each run of columns that share both scales, scaled, then added.
    fn dot(&self, matrix: &Matrix<'_>, row: usize) -> f32 {
        let Some((width, scales)) = &self.spans else { return dot(matrix, row, &self.values) };
        let (mut sum, mut run) = (0.0, 0.0);
        for (col, value) in self.values.iter().enumerate() {
            run += f64::from(matrix.code_value(row, col)) * f64::from(*value);
            let (block, span) = (matrix.block_of(col), col / width);
            let last = col + 1 == self.values.len();
            if last || matrix.block_of(col + 1) != block || (col + 1) / width != span {
                let [scale, _] = matrix.block_scale(row, block);
                sum += run * f64::from(scale) * f64::from(scales[span]);
                run = 0.0;
            }
        }
        (sum * f64::from(matrix.row_scale(row))) as f32
    }
}

/// A row on its way through an expert.
#[derive(Clone, Copy)]
struct ExpertRow<'a> {
    x: &'a [f32],
    weight: f32,
    position: WeightPosition,
    /// How deltas join, if this expert may have adapters.
    delta: Option<LoraDelta>,
    lora: Option<&'a LoraWeights<'a>>,
}

impl<'a> ExpertRow<'a> {
    /// One that nothing weights or adapts.
    fn of(x: &'a [f32]) -> Self {
        Self { x, weight: 1.0, position: WeightPosition::Output, delta: None, lora: None }
    }

    /// What a token's slot sends through a routed expert.
    fn routed(spec: &MoeSpec, x: &'a [f32], one: &Chosen, slot: usize, weights: &'a MoeWeights<'_>) -> Self {
        let lora = one.adapter.and_then(|adapter| weights.lora.get(adapter)).and_then(|experts| experts.get(slot));
        let position = spec.routing.weight_position;
        Self { x, weight: one.weight, position, delta: spec.lora.as_ref().map(|lora| lora.delta), lora }
    }

    /// What enters the first GEMM before it is quantised.
    fn weighted(&self, spec: &MoeSpec) -> Vec<f32> {
        let rounded = spec.precision.rounded(spec.precision.weighted_input);
        match self.position {
            WeightPosition::Output | WeightPosition::BeforeDown => self.x.to_vec(),
            WeightPosition::Input => self.x.iter().map(|x| numerics::round_to(rounded, x * self.weight)).collect(),
        }
    }
}

/// A GEMM's sum with what an adapter adds to it: `B (A x)`, of which `inner` is `A x`.
fn adapt(spec: &MoeSpec, row: &ExpertRow<'_>, sum: f32, b: Option<&Matrix<'_>>, inner: &[f32], at: usize) -> f32 {
    let added = b.map_or(0.0, |b| dot(b, at, inner));
    let model = |value| numerics::round_to(spec.precision.model, value);
    match row.delta {
        None => sum,
        Some(LoraDelta::F32) => sum + added,
        Some(LoraDelta::Model) => model(model(sum) + model(added)),
    }
}

/// What enters the second GEMM before it is quantised.
fn hidden_row(
    spec: &MoeSpec,
    shape: &ExpertMlp,
    weights: &MlpWeights<'_>,
    entering: ExpertRow<'_>,
    amax: &TensorAmax,
) -> Vec<f32> {
    let precision = &spec.precision;
    let rounded = |rounding: Rounding, value: f32| numerics::round_to(precision.rounded(rounding), value);
    let before_down = match entering.position {
        WeightPosition::Output | WeightPosition::Input => None,
        WeightPosition::BeforeDown => Some(entering.weight),
    };
    let MlpWeights { gate, up, down, gate_bias, up_bias, down_bias: _, input_scales } = weights;
    let bias = |bias: &Option<Vec<f32>>, row: usize| bias.as_ref().map_or(0.0, |bias| bias[row]);
    let fixed = input_scales.map(|scales| scales.gate_up);
    let x = entering.weighted(spec);
    // Adapters read what enters before it is quantised.
    let inner = entering.lora.map(|lora| project(&lora.gate_up_a, &x)).unwrap_or_default();
    let x = Entering::of(x, shape.activation_quant, fixed, amax.input);
    let [up_b, gate_b] = [entering.lora.map(|lora| &lora.up_b), entering.lora.and_then(|lora| lora.gate_b.as_ref())];
    (0..down.shape()[1])
        .map(|row| {
            let up = adapt(spec, &entering, x.dot(up, row), up_b, &inner, row) + bias(up_bias, row);
            let up = rounded(precision.gate_up, up);
            let gate = match gate {
                Some(gate) => {
                    let sum = adapt(spec, &entering, x.dot(gate, row), gate_b, &inner, row);
                    rounded(precision.gate_up, sum + bias(gate_bias, row))
                }
                None => up,
            };
            let [gate, up] = numerics::activate_parts(shape.activation, gate, up);
            let model = |value: f32| numerics::round_to(precision.model, value);
            let weighted = |value: f32| before_down.map_or(value, |weight| value * weight);
            match precision.activation {
                ActivationRounding::F32 => weighted(gate * up),
                ActivationRounding::Fused => model(weighted(gate * up)),
                ActivationRounding::Torch => model(weighted(model(model(gate) * model(up)))),
            }
        })
        .collect()
}

/// One expert on one row, unweighted except where the weight acts inside.
fn mlp(spec: &MoeSpec, shape: &ExpertMlp, weights: &MlpWeights<'_>, row: ExpertRow<'_>, amax: &TensorAmax) -> Vec<f32> {
    let hidden = hidden_row(spec, shape, weights, row, amax);
    let inner = row.lora.map(|lora| project(&lora.down_a, &hidden)).unwrap_or_default();
    let down_b = row.lora.map(|lora| &lora.down_b);
    let fixed = weights.input_scales.map(|scales| scales.down);
    let hidden = Entering::of(hidden, shape.activation_quant, fixed, amax.hidden);
    let bias = |row: usize| weights.down_bias.as_ref().map_or(0.0, |bias| bias[row]);
    let down = &weights.down;
    (0..down.shape()[0]).map(|at| adapt(spec, &row, hidden.dot(down, at), down_b, &inner, at) + bias(at)).collect()
}
