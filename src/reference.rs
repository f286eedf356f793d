//! The layer as its definition reads, token by token: the judge of every backend.
//!
//! Plain loops over the spec, the weights and `numerics` (and the list of what has not landed); it knows no schedule and no kernel, so a
//! fault of theirs cannot hide in it. Dot products are summed in f64 and rounded to f32 once;
//! scores, keys and weights are f32, as the models compute them, because ties depend on it.

use crate::error::{Error, Result};
use crate::numerics;
use crate::spec::{
    ChosenScore, ExpertMlp, GroupScore, Groups, LogitTransform, MoeSpec, NanPolicy, Router, Routing, RoutingMethod,
    Score, SelectionKey, SharedCombination, SharedExperts, SharedGate, WeightPosition,
};
use crate::support::{self, Scope};
use crate::weights::{Matrix, MlpWeights, MoeWeights, RouterWeights};

/// What enters a layer, widened to f32.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// [T, H].
    pub hidden_states: &'a [f32],
    /// `[T]`, for hash routing.
    pub token_ids: Option<&'a [u32]>,
    /// [T, outputs], if the caller gives the logits.
    pub logits: Option<&'a [f32]>,
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
}

/// What leaves a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The router's part.
    pub routed: Routed,
    /// [T, H], rounded to the output type and widened again.
    pub output: Vec<f32>,
}

/// Computes ids and weights.
///
/// # Errors
/// An invalid spec, weights or inputs that do not fit it, a token id outside of the hash table, or
/// a part of the spec that the reference lacks.
pub fn route(spec: &MoeSpec, router: &RouterWeights<'_>, inputs: Inputs<'_>) -> Result<Routed> {
    spec.validate()?;
    support::landed("reference", spec, Scope::Routing)?;
    router.check(spec)?;
    let tokens = token_count(spec, inputs.hidden_states)?;
    let outputs = spec.router_outputs();
    let mut routed = Routed {
        logits: Vec::with_capacity(tokens * outputs),
        topk_ids: Vec::with_capacity(tokens * spec.top_k),
        topk_weights: Vec::with_capacity(tokens * spec.top_k),
    };
    for token in 0..tokens {
        let x = &inputs.hidden_states[token * spec.hidden_size..][..spec.hidden_size];
        let logits = logits(spec, router, inputs.logits, token, x)?;
        let token_id = match inputs.token_ids {
            None => None,
            Some(ids) => Some(*ids.get(token).ok_or_else(|| {
                Error::invalid("token_ids", ids.len(), format!("{tokens}, one a token"), "give the id of each token")
            })?),
        };
        let choice = choose(spec, router, &logits, token_id)?;
        routed.logits.extend_from_slice(&logits);
        for (id, weight) in choice {
            routed.topk_ids.push(id as i32);
            routed.topk_weights.push(weight);
        }
    }
    Ok(routed)
}

/// Computes the layer.
///
/// # Errors
/// As [`route`].
pub fn layer(spec: &MoeSpec, weights: &MoeWeights<'_>, inputs: Inputs<'_>) -> Result<Layer> {
    spec.validate()?;
    support::landed("reference", spec, Scope::Layer)?;
    weights.check(spec)?;
    let routed = route(spec, &weights.router, inputs)?;
    let hidden_size = spec.hidden_size;
    let rho = spec.routing.routed_scaling_factor;
    let output_scale = if spec.routing.apply_routed_scale_to_output { f64::from(rho) } else { 1.0 };
    let mut output = Vec::with_capacity(inputs.hidden_states.len());
    for (token, x) in inputs.hidden_states.chunks_exact(hidden_size).enumerate() {
        let mut sum = vec![0f64; hidden_size];
        for slot in token * spec.top_k..(token + 1) * spec.top_k {
            let weight = routed.topk_weights[slot];
            let expert = &weights.experts[routed.topk_ids[slot] as usize];
            let position = spec.routing.weight_position;
            let row = mlp(&spec.experts, expert, x, weight, position);
            let on_output = match position {
                WeightPosition::Output => f64::from(weight),
                WeightPosition::Input | WeightPosition::BeforeDown => 1.0,
            };
            for (sum, value) in sum.iter_mut().zip(row) {
                *sum += on_output * f64::from(value);
            }
        }
        for sum in &mut sum {
            *sum *= output_scale;
        }
        if let (Some(SharedExperts { mlp: shape, gate, combination }), Some(shared)) = (&spec.shared, &weights.shared) {
            let factor = match (gate, &weights.shared_gate) {
                (SharedGate::Sigmoid { format: _ }, Some(row)) => f64::from(numerics::sigmoid(dot(row, 0, x))),
                (SharedGate::Sigmoid { format: _ }, None) | (SharedGate::None, _) => 1.0,
            };
            let row = mlp(shape, shared, x, 1.0, WeightPosition::Output);
            let average = match combination {
                SharedCombination::Sum => 1.0,
                SharedCombination::Average => 0.5,
            };
            for (sum, value) in sum.iter_mut().zip(row) {
                *sum = average * (*sum + factor * f64::from(value));
            }
        }
        output.extend(sum.iter().map(|&sum| numerics::round_to(spec.precision.output, sum as f32)));
    }
    Ok(Layer { routed, output })
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

fn logits(
    spec: &MoeSpec,
    router: &RouterWeights<'_>,
    given: Option<&[f32]>,
    token: usize,
    x: &[f32],
) -> Result<Vec<f32>> {
    let outputs = spec.router_outputs();
    let (raw, transform): (Vec<f32>, _) = match (&spec.router, &router.weight) {
        (Router::Linear { input: _, format: _, bias: _, transform }, Some(weight)) => {
            let bias = |output| router.bias.as_ref().map_or(0.0, |bias| bias[output]);
            ((0..outputs).map(|output| dot(weight, output, x) + bias(output)).collect(), *transform)
        }
        (Router::Given { transform }, _) => {
            let row = given.and_then(|logits| logits.get(token * outputs..(token + 1) * outputs));
            let row = row.ok_or_else(|| {
                Error::invalid("logits", "too few", "[tokens, outputs]", "give the logits of each token")
            })?;
            (row.to_vec(), *transform)
        }
        (Router::Linear { input: _, format: _, bias: _, transform: _ }, None)
        | (Router::Mlp { state_size: _, rms_norm_eps: _ }, _) => {
            return Err(refuse("router", &spec.router, "the reference has no such router"));
        }
    };
    Ok(match transform {
        LogitTransform::None => raw,
        LogitTransform::SoftCap { cap } => raw.iter().map(|l| cap * (l / cap).tanh()).collect(),
        LogitTransform::Multiply { factor } => raw.iter().map(|l| l * factor).collect(),
    })
}

/// Ids and weights of one token, in descending order of the key.
fn choose(
    spec: &MoeSpec,
    router: &RouterWeights<'_>,
    logits: &[f32],
    token_id: Option<u32>,
) -> Result<Vec<(usize, f32)>> {
    let Routing {
        method,
        renormalize,
        routed_scaling_factor,
        apply_routed_scale_to_output,
        per_expert_scale: _,
        weight_position: _,
        zero_experts: _,
        nan_policy,
    } = &spec.routing;
    let not_finite = match nan_policy {
        NanPolicy::Zero => 0.0,
        NanPolicy::Propagate => f32::NAN,
    };
    let (ids, mut weights): (Vec<usize>, Vec<f32>) = match method {
        RoutingMethod::TopK { score, key, groups } => {
            let scores = scores(*score, logits);
            let bias = |e: usize| router.selection_bias.as_ref().map_or(0.0, |bias| bias[e]);
            // `None` sorts below every number: a score that is not finite is chosen last.
            let keys: Vec<Option<f32>> = (0..logits.len())
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
                None => vec![true; logits.len()],
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
            let ids = largest(&keys, &vec![true; logits.len()], spec.top_k);
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
        RoutingMethod::JointNorm { num_shared: _, global_scale: _ }
        | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => {
            return Err(refuse("routing.method", method, "the reference has no such method"));
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
    if !apply_routed_scale_to_output {
        for weight in &mut weights {
            *weight *= routed_scaling_factor;
        }
    }
    Ok(ids.into_iter().zip(weights).collect())
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

/// One expert on one row, unweighted except where the weight acts inside.
fn mlp(shape: &ExpertMlp, weights: &MlpWeights<'_>, x: &[f32], weight: f32, position: WeightPosition) -> Vec<f32> {
    let (on_input, before_down) = match position {
        WeightPosition::Output => (1.0, 1.0),
        WeightPosition::Input => (weight, 1.0),
        WeightPosition::BeforeDown => (1.0, weight),
    };
    let MlpWeights { gate, up, down, gate_bias, up_bias, down_bias } = weights;
    let bias = |bias: &Option<Vec<f32>>, row: usize| bias.as_ref().map_or(0.0, |bias| bias[row]);
    let x: Vec<f32> = x.iter().map(|x| x * on_input).collect();
    let hidden: Vec<f32> = (0..shape.intermediate_size)
        .map(|row| {
            let up = dot(up, row, &x) + bias(up_bias, row);
            let value = match gate {
                Some(gate) => numerics::activate(shape.activation, dot(gate, row, &x) + bias(gate_bias, row), up),
                None => numerics::activate(shape.activation, up, up),
            };
            value * before_down
        })
        .collect();
    (0..down.shape()[0]).map(|row| dot(down, row, &hidden) + bias(down_bias, row)).collect()
}

fn refuse(field: &'static str, value: &dyn std::fmt::Debug, because: &'static str) -> Error {
    support::refuse("reference", field, value, because).into()
}
