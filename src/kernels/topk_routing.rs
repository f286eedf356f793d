//! `topk_routing`: logits [T, outputs] to `topk_ids` i32 [T, k] and `topk_weights` f32 [T, k].
//!
//! Ids come in descending order of the key, ties to the lower id. Exact, except where a score's
//! `exp` differs in its last bits: then keys closer than that may change places, and weights are Bounded.
//! A token id outside of the hash table gives ids -2 and NaN weights; `combine` makes its row NaN.

use arrayvec::ArrayVec;

use super::{Arguments, PARAMS, Source, Value, read, round_fragments, shader, unique, write};
use crate::error::Result;
use crate::numerics::{self, order_key};
use crate::spec::{
    ChosenScore, Denominator, FloatType, GroupScore, Groups, LogitTransform, MAX_ROUTER_OUTPUTS, NanPolicy,
    RoutingMethod, Score, SelectionKey,
};

/// A value for each output of a router, on the stack.
type Row<T> = ArrayVec<T, MAX_ROUTER_OUTPUTS>;

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct TopkRouting {
    /// E.
    pub num_experts: usize,
    /// E plus zero experts.
    pub selectable: usize,
    /// Width of the logits.
    pub router_outputs: usize,
    /// k.
    pub top_k: usize,
    /// Rounding of the logits, before the transform.
    pub logits: FloatType,
    /// What is done to the logits.
    pub transform: LogitTransform,
    /// Score and selection.
    pub method: RoutingMethod,
    /// Renormalisation.
    pub renormalize: Option<Denominator>,
    /// Whether there are factors for the experts.
    pub per_expert_scale: bool,
    /// rho if it acts in the weights, else 1.
    pub weight_scale: f32,
    /// Whether zero experts return nothing: their weight is 0.
    pub zero_experts_skip: bool,
    /// What a score that is not finite does.
    pub nan_policy: NanPolicy,
    /// Rounding of the weights, at the end.
    pub weights: FloatType,
}

/// The method taken apart as the kernel's slots have it.
struct Parts {
    score: Score,
    key: SelectionKey,
    groups: Option<Groups>,
    weigh: Weigh,
    vocab_size: Option<usize>,
}

/// From the scores of the chosen to weights.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Weigh {
    /// As they are.
    Scores,
    /// The scores are logits.
    Chosen(ChosenScore),
    /// Likewise, with the relative width of "near".
    Sparsemixer(f32),
    /// With the shared logits; whether there is a factor on all.
    Joint { num_shared: usize, global_scale: bool },
}

impl TopkRouting {
    fn parts(&self) -> Parts {
        let plain =
            |score| Parts { score, key: SelectionKey::Score, groups: None, weigh: Weigh::Scores, vocab_size: None };
        match self.method {
            RoutingMethod::TopK { score, key, groups } => Parts { key, groups, ..plain(score) },
            RoutingMethod::TopKThenScore { score } => Parts { weigh: Weigh::Chosen(score), ..plain(Score::Identity) },
            RoutingMethod::Hash { score, vocab_size } => Parts { vocab_size: Some(vocab_size), ..plain(score) },
            RoutingMethod::JointNorm { num_shared, global_scale } => {
                let weigh = Weigh::Joint { num_shared, global_scale };
                Parts { key: SelectionKey::ScorePlusBias, weigh, ..plain(Score::Sigmoid) }
            }
            RoutingMethod::Sparsemixer { router_jitter_noise } => {
                Parts { weigh: Weigh::Sparsemixer(router_jitter_noise), ..plain(Score::Identity) }
            }
        }
    }

    /// Scores, keys, the chosen, two words a group, and the softmax's three scans.
    pub(super) fn workgroup_bytes(&self) -> usize {
        let groups = self.parts().groups.map_or(0, |groups| groups.n_group);
        4 * (2 * self.router_outputs + self.top_k + 2 * groups + 3 * self.workgroup())
    }

    /// Whether a table says which experts a token has.
    pub fn reads_table(&self) -> bool {
        self.parts().vocab_size.is_some()
    }

    /// Invocations: one for each output, where there may be so many and memory is left for their scans.
    fn workgroup(&self) -> usize {
        match self.router_outputs {
            outputs @ ..=512 => outputs.next_power_of_two().clamp(64, 256),
            _ => 64,
        }
    }

    pub(super) fn source(&self) -> Source {
        let Parts { score, key, groups, weigh, vocab_size } = self.parts();
        // One of the two types is T or both are f32: the spec has one T.
        let model = if self.logits == FloatType::F32 { self.weights } else { self.logits };
        let mut constants = vec![
            ("WORKGROUP", Value::U32(self.workgroup() as u32)),
            ("ROUTER_OUTPUTS", Value::U32(self.router_outputs as u32)),
            ("SELECTABLE", Value::U32(self.selectable as u32)),
            ("NUM_EXPERTS", Value::U32(self.num_experts as u32)),
            ("TOP_K", Value::U32(self.top_k as u32)),
            ("ROUND_LOGITS", Value::Bool(self.logits != FloatType::F32)),
            ("ROUND_WEIGHTS", Value::Bool(self.weights != FloatType::F32)),
            ("ROUTED_SCALING_FACTOR", Value::F32(self.weight_scale)),
            ("ZERO_EXPERTS_SKIP", Value::Bool(self.zero_experts_skip)),
            ("NAN_PROPAGATES", Value::Bool(self.nan_policy == NanPolicy::Propagate)),
        ];
        let mut bindings = vec![
            PARAMS,
            read("logits", "array<f32>"),
            write("topk_ids", "array<i32>"),
            write("topk_weights", "array<u32>"),
        ];
        let mut fragments = vec![shader!("fragments/params.wgsl"), shader!("fragments/order_key.wgsl")];
        fragments.extend(round_fragments(model));
        match self.transform {
            LogitTransform::None => fragments.push(shader!("fragments/transform_none.wgsl")),
            LogitTransform::SoftCap { cap } => {
                constants.push(("LOGIT_CAP", Value::F32(cap)));
                fragments.extend([
                    shader!("fragments/keep_nan.wgsl"),
                    shader!("fragments/tanh.wgsl"),
                    shader!("fragments/transform_soft_cap.wgsl"),
                ]);
            }
            LogitTransform::Multiply { factor } => {
                constants.push(("LOGIT_FACTOR", Value::F32(factor)));
                fragments.push(shader!("fragments/transform_multiply.wgsl"));
            }
        }
        fragments.push(shader!("fragments/logits.wgsl"));
        let sigmoid = shader!("fragments/sigmoid.wgsl");
        match weigh {
            Weigh::Chosen(ChosenScore::Softmax) | Weigh::Sparsemixer(_) => {
                fragments.push(shader!("fragments/score_chosen_softmax.wgsl"));
            }
            Weigh::Chosen(ChosenScore::Sigmoid) => {
                fragments.push(shader!("fragments/score_chosen_sigmoid.wgsl"));
            }
            Weigh::Scores | Weigh::Joint { num_shared: _, global_scale: _ } => match score {
                Score::Softmax => fragments.push(shader!("fragments/score_softmax.wgsl")),
                Score::Sigmoid => fragments.extend([sigmoid, shader!("fragments/score_sigmoid.wgsl")]),
                Score::SqrtSoftplus => {
                    fragments.extend([shader!("fragments/log_1p.wgsl"), shader!("fragments/score_sqrt_softplus.wgsl")]);
                }
                Score::Identity => fragments.push(shader!("fragments/score_identity.wgsl")),
            },
        }
        let selection_bias = read("selection_bias", "array<f32>");
        match key {
            SelectionKey::Score => fragments.push(shader!("fragments/key_score.wgsl")),
            SelectionKey::ScorePlusBias => {
                bindings.push(selection_bias);
                fragments.push(shader!("fragments/key_score_plus_bias.wgsl"));
            }
            SelectionKey::LogitPlusBias => {
                bindings.push(selection_bias);
                fragments.push(shader!("fragments/key_logit_plus_bias.wgsl"));
            }
        }
        match vocab_size {
            Some(vocab_size) => {
                constants.push(("VOCAB_SIZE", Value::U32(vocab_size as u32)));
                bindings.extend([read("token_ids", "array<u32>"), read("tid2eid", "array<i32>")]);
                fragments.push(shader!("fragments/select_hash.wgsl"));
            }
            None => {
                match groups {
                    None => fragments.push(shader!("fragments/groups_none.wgsl")),
                    Some(Groups { n_group, topk_group, score }) => {
                        constants.push(("N_GROUP", Value::U32(n_group as u32)));
                        constants.push(("TOPK_GROUP", Value::U32(topk_group as u32)));
                        fragments.push(match score {
                            GroupScore::Top2SumOfKey => shader!("fragments/group_score_top2_sum_of_key.wgsl"),
                            GroupScore::Top2SumOfScore => shader!("fragments/group_score_top2_sum_of_score.wgsl"),
                            GroupScore::MaxOfScore => shader!("fragments/group_score_max_of_score.wgsl"),
                        });
                        fragments.push(shader!("fragments/groups_best.wgsl"));
                    }
                }
                fragments.push(shader!("fragments/select_rank.wgsl"));
            }
        }
        match weigh {
            Weigh::Scores => fragments.push(shader!("fragments/weigh_scores.wgsl")),
            Weigh::Chosen(ChosenScore::Softmax) => fragments.push(shader!("fragments/weigh_softmax.wgsl")),
            Weigh::Chosen(ChosenScore::Sigmoid) => {
                fragments.extend([sigmoid, shader!("fragments/weigh_sigmoid.wgsl")]);
            }
            Weigh::Sparsemixer(noise) => {
                constants.push(("ROUTER_JITTER_NOISE", Value::F32(noise)));
                fragments.push(shader!("fragments/weigh_sparsemixer.wgsl"));
            }
            Weigh::Joint { num_shared, global_scale } => {
                constants.push(("NUM_SHARED", Value::U32(num_shared as u32)));
                bindings.push(write("shared_weights", "array<u32>"));
                fragments.push(match global_scale {
                    true => {
                        bindings.push(read("global_scales", "array<f32>"));
                        shader!("fragments/global_scale_table.wgsl")
                    }
                    false => shader!("fragments/global_scale_none.wgsl"),
                });
                fragments.extend([shader!("fragments/log_1p.wgsl"), shader!("fragments/weigh_joint.wgsl")]);
            }
        }
        fragments.push(match self.renormalize {
            None => match weigh {
                Weigh::Joint { num_shared: _, global_scale: _ } => shader!("fragments/renormalize_joint.wgsl"),
                Weigh::Scores | Weigh::Chosen(_) | Weigh::Sparsemixer(_) => shader!("fragments/renormalize_none.wgsl"),
            },
            Some(Denominator::Sum) => shader!("fragments/renormalize_sum.wgsl"),
            Some(Denominator::SumPlus { eps }) => {
                constants.push(("RENORMALIZE_EPS", Value::F32(eps)));
                shader!("fragments/renormalize_sum_plus.wgsl")
            }
            Some(Denominator::AtLeast { floor }) => {
                constants.push(("RENORMALIZE_FLOOR", Value::F32(floor)));
                shader!("fragments/renormalize_at_least.wgsl")
            }
            Some(Denominator::SumOrOne) => shader!("fragments/renormalize_sum_or_one.wgsl"),
            Some(Denominator::PNorm { p }) => {
                constants.push(("RENORMALIZE_P", Value::F32(p)));
                shader!("fragments/renormalize_p_norm.wgsl")
            }
        });
        fragments.push(match self.per_expert_scale {
            true => {
                bindings.push(read("per_expert_scale", "array<f32>"));
                shader!("fragments/expert_scale_table.wgsl")
            }
            false => shader!("fragments/expert_scale_none.wgsl"),
        });
        fragments.push(shader!("topk_routing/select.wgsl"));
        Source { constants, bindings, fragments: unique(fragments) }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let tokens = arguments.tokens()?;
        let logits = arguments.read_f32("logits")?;
        let parts = self.parts();
        let bias = match parts.key {
            SelectionKey::Score => None,
            SelectionKey::ScorePlusBias | SelectionKey::LogitPlusBias => Some(arguments.read_f32("selection_bias")?),
        };
        let hash = match parts.vocab_size {
            None => None,
            Some(_) => Some((arguments.read("token_ids")?, arguments.read_i32("tid2eid")?)),
        };
        let expert_scale = if self.per_expert_scale { Some(arguments.read_f32("per_expert_scale")?) } else { None };
        let (num_shared, global_scale) = match parts.weigh {
            Weigh::Joint { num_shared, global_scale: true } => (num_shared, arguments.read_f32("global_scales")?[0]),
            Weigh::Joint { num_shared, global_scale: false } => (num_shared, 1.0),
            Weigh::Scores | Weigh::Chosen(_) | Weigh::Sparsemixer(_) => (0, 1.0),
        };
        let mut shares = if num_shared > 0 { Some(arguments.write("shared_weights")?) } else { None };
        let topk_ids = arguments.write("topk_ids")?;
        let topk_weights = arguments.write("topk_weights")?;
        for token in 0..tokens {
            let logits: Row<f32> =
                logits[token * self.router_outputs..][..self.router_outputs].iter().map(|l| self.logit(*l)).collect();
            let ids = &mut topk_ids[token * self.top_k..][..self.top_k];
            let weights = &mut topk_weights[token * self.top_k..][..self.top_k];
            let legal_for_softmax =
                || logits.iter().map(|&l| Some(l).filter(|l| !l.is_nan() && *l < f32::INFINITY)).collect();
            let scores: Row<Option<f32>> = match parts.weigh {
                Weigh::Scores | Weigh::Joint { num_shared: _, global_scale: _ } => score_row(parts.score, &logits),
                // The logits themselves are compared; whether their score will be finite decides.
                Weigh::Chosen(ChosenScore::Softmax) | Weigh::Sparsemixer(_) => legal_for_softmax(),
                Weigh::Chosen(ChosenScore::Sigmoid) => {
                    logits.iter().map(|&l| Some(l).filter(|l| !l.is_nan())).collect()
                }
            };
            let key = |e: usize| {
                let score = scores[e]?;
                let key = match parts.key {
                    SelectionKey::Score => score,
                    SelectionKey::ScorePlusBias => score + bias.map_or(0.0, |bias| bias[e]),
                    SelectionKey::LogitPlusBias => logits[e] + bias.map_or(0.0, |bias| bias[e]),
                };
                (!key.is_nan()).then_some(key)
            };
            let keys: Row<u32> = (0..self.selectable).map(|e| key(e).map_or(0, order_key)).collect();
            let chosen: Row<usize> = match hash {
                None => select(&keys, &scores, parts.groups, self.top_k),
                Some((token_ids, tid2eid)) => {
                    let row = token_ids[token] as usize;
                    if parts.vocab_size.is_none_or(|vocab_size| row >= vocab_size) {
                        ids.fill(-2i32 as u32);
                        weights.fill(f32::NAN.to_bits());
                        continue;
                    }
                    tid2eid[row * self.top_k..][..self.top_k].iter().map(|&id| id as usize).collect()
                }
            };
            let values: Row<Option<f32>> =
                chosen.iter().map(|&e| if keys[e] == 0 { None } else { scores[e] }).collect();
            let (values, spoiled) = match parts.weigh {
                Weigh::Scores => (values, false),
                Weigh::Chosen(score) => (weigh_chosen(score, &values), false),
                Weigh::Sparsemixer(noise) => (weigh_near(noise, &chosen, &scores), false),
                Weigh::Joint { num_shared: _, global_scale: _ } => {
                    let all: Row<f32> =
                        chosen.iter().map(|&e| logits[e]).chain(logits[self.selectable..].iter().copied()).collect();
                    let mut joint = weigh_joint(&all, global_scale);
                    let of_shared: Row<Option<f32>> = joint.drain(self.top_k..).collect();
                    let spoiled = of_shared.contains(&None);
                    let any = spoiled || joint.contains(&None);
                    if let Some(shares) = &mut shares {
                        let shares = &mut shares[token * num_shared..][..num_shared];
                        for (share, value) in shares.iter_mut().zip(&of_shared) {
                            let value = value.unwrap_or(0.0) * self.weight_scale;
                            let nan = any && self.nan_policy == NanPolicy::Propagate;
                            *share = if nan { f32::NAN } else { numerics::round_to(self.weights, value) }.to_bits();
                        }
                    }
                    (joint, spoiled)
                }
            };
            let scaled = self.scaled(&chosen, &values, spoiled, expert_scale);
            for ((id, weight), (e, value)) in ids.iter_mut().zip(weights).zip(chosen.iter().zip(scaled)) {
                *id = *e as u32;
                *weight = value.to_bits();
            }
        }
        Ok(())
    }

    /// Twin: shaders/fragments/logits.wgsl and transform_*.wgsl
    fn logit(&self, logit: f32) -> f32 {
        let logit = numerics::round_to(self.logits, logit);
        match self.transform {
            LogitTransform::None => logit,
            LogitTransform::SoftCap { cap } => cap * (logit / cap).tanh(),
            LogitTransform::Multiply { factor } => logit * factor,
        }
    }

    /// Renormalised, scaled and rounded; `None` is a score that is not finite, `spoiled` a shared one.
    fn scaled(
        &self,
        chosen: &[usize],
        values: &[Option<f32>],
        spoiled: bool,
        expert_scale: Option<&[f32]>,
    ) -> Row<f32> {
        let numbers: Row<f32> = values.iter().map(|value| value.unwrap_or(0.0)).collect();
        let divisor = self.renormalize.map_or(1.0, |rule| numerics::denominator(rule, &numbers));
        let joint = match self.parts().weigh {
            Weigh::Joint { num_shared: _, global_scale: _ } => true,
            Weigh::Scores | Weigh::Chosen(_) | Weigh::Sparsemixer(_) => false,
        };
        let spoiled = (self.renormalize.is_some() || joint) && (spoiled || values.contains(&None));
        let weight = |at: usize| {
            let id = chosen[at];
            if self.zero_experts_skip && id >= self.num_experts {
                return 0.0;
            }
            if self.nan_policy == NanPolicy::Propagate && (values[at].is_none() || spoiled) {
                return f32::NAN;
            }
            // A zero expert has no scale of its own.
            let scale = expert_scale.and_then(|scale| scale.get(id)).copied().unwrap_or(1.0);
            let weight = (if divisor == 0.0 { 0.0 } else { numbers[at] / divisor }) * scale * self.weight_scale;
            numerics::round_to(self.weights, weight)
        };
        (0..chosen.len()).map(weight).collect()
    }
}

/// Scores, `None` where not finite. Twin: shaders/fragments/score_*.wgsl
fn score_row(score: Score, logits: &[f32]) -> Row<Option<f32>> {
    let each = |f: fn(f32) -> f32| logits.iter().map(|&l| Some(f(l)).filter(|s| s.is_finite())).collect();
    match score {
        Score::Identity => each(|l| l),
        Score::Sigmoid => each(numerics::sigmoid),
        Score::SqrtSoftplus => each(numerics::sqrt_softplus),
        Score::Softmax => {
            let spoiled = logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY);
            let largest = logits
                .iter()
                .copied()
                .filter(|l| l.is_finite())
                .fold(None, |largest: Option<f32>, l| Some(largest.map_or(l, |largest| largest.max(l))));
            let Some(largest) = largest.filter(|_| !spoiled) else { return logits.iter().map(|_| None).collect() };
            let exps: Row<f32> = logits.iter().map(|l| (l - largest).exp()).collect();
            let sum: f32 = exps.iter().sum();
            exps.iter().map(|e| Some(e / sum)).collect()
        }
    }
}

/// Ranks by counting, as the kernel does.
fn select(keys: &[u32], scores: &[Option<f32>], groups: Option<Groups>, top_k: usize) -> Row<usize> {
    let best = |keys: &[Option<u32>], count: usize| {
        let mut chosen: Row<usize> = std::iter::repeat_n(0, count).collect();
        for (e, key) in keys.iter().enumerate().filter(|(_, key)| key.is_some()) {
            let before = |(other, k): (usize, &Option<u32>)| k.is_some() && (k > key || (k == key && other < e));
            let rank = keys.iter().enumerate().filter(|&entry| before(entry)).count();
            if let Some(slot) = chosen.get_mut(rank) {
                *slot = e;
            }
        }
        chosen
    };
    let Some(Groups { n_group, topk_group, score }) = groups else {
        return best(&keys.iter().copied().map(Some).collect::<Row<_>>(), top_k);
    };
    let size = keys.len() / n_group;
    let judge = |group: usize| {
        let mut two = [(0u32, 0f32); 2];
        for e in group * size..(group + 1) * size {
            let value = scores[e].unwrap_or(0.0);
            let member = match score {
                GroupScore::Top2SumOfKey => (keys[e], from_order_key(keys[e])),
                GroupScore::Top2SumOfScore | GroupScore::MaxOfScore => {
                    (if keys[e] == 0 { 0 } else { order_key(value) }, value)
                }
            };
            if member.0 > two[0].0 {
                two = [member, two[0]];
            } else if member.0 > two[1].0 {
                two[1] = member;
            }
        }
        match score {
            GroupScore::MaxOfScore => two[0].0,
            GroupScore::Top2SumOfKey | GroupScore::Top2SumOfScore => {
                let sum = two[0].1 + two[1].1;
                if two[1].0 == 0 || sum.is_nan() { 0 } else { order_key(sum) }
            }
        }
    };
    let judged: Row<Option<u32>> = (0..n_group).map(|group| Some(judge(group))).collect();
    let kept = best(&judged, topk_group);
    let allowed: Row<Option<u32>> =
        keys.iter().enumerate().map(|(e, key)| kept.contains(&(e / size)).then_some(*key)).collect();
    best(&allowed, top_k)
}

/// The number behind an [`order_key`].
fn from_order_key(key: u32) -> f32 {
    f32::from_bits(if key & 0x8000_0000 == 0 { !key } else { key ^ 0x8000_0000 })
}

/// Scores of the chosen logits. Twin: shaders/fragments/weigh_{softmax,sigmoid}.wgsl
fn weigh_chosen(score: ChosenScore, values: &[Option<f32>]) -> Row<Option<f32>> {
    match score {
        ChosenScore::Sigmoid => values.iter().map(|value| value.map(numerics::sigmoid)).collect(),
        ChosenScore::Softmax => softmax(values),
    }
}

/// Softmax over those that are numbers; if only -inf is left, no weight at all.
fn softmax(values: &[Option<f32>]) -> Row<Option<f32>> {
    let largest = values.iter().flatten().copied().fold(f32::MIN, f32::max);
    let exps: Row<Option<f32>> = values.iter().map(|value| value.map(|l| (l - largest).exp())).collect();
    let sum: f32 = exps.iter().flatten().sum();
    exps.iter().map(|e| e.map(|e| if sum == 0.0 { 0.0 } else { e / sum })).collect()
}

/// Twin: shaders/fragments/weigh_sparsemixer.wgsl
fn weigh_near(noise: f32, chosen: &[usize], scores: &[Option<f32>]) -> Row<Option<f32>> {
    let weigh = |slot: usize| {
        let largest = scores[chosen[slot]]?;
        let near = |logit: f32| {
            let width = logit.abs().max(largest);
            logit.is_finite() && !(width > 0.0 && (largest - logit) / width > 2.0 * noise)
        };
        let others = scores.iter().enumerate().filter(|(e, _)| !chosen[..slot].contains(e));
        let sum: f32 = others.filter_map(|(_, l)| *l).filter(|l| near(*l)).map(|l| (l - largest).exp()).sum();
        Some(if sum == 0.0 || !largest.is_finite() { 0.0 } else { 1.0 / sum })
    };
    (0..chosen.len()).map(weigh).collect()
}

/// Shares of the chosen and the shared; `None` is NaN. Twin: shaders/fragments/weigh_joint.wgsl
fn weigh_joint(logits: &[f32], global_scale: f32) -> Row<Option<f32>> {
    let logs: Row<Option<f32>> =
        logits.iter().map(|&l| Some(numerics::log_sigmoid(l)).filter(|log| !log.is_nan())).collect();
    softmax(&logs).iter().map(|share| share.map(|share| share * global_scale)).collect()
}
