//! `combine`: the routed sum, rho and the output bias on it, the shared experts beside it.
//!
//! `out[t] = scale * sum over slots of weight * expert_out (+ bias) (+ shared_out)`, in the order and with the
//! roundings of the precision. Bounded by the contraction of products and sums, and by the gate's `exp`.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Arguments, PARAMS, Source, Value, cuda_blocks, decode_value, input_fragments, read, round_fragments, shader,
    unique, write,
};
use crate::error::Result;
use crate::numerics;
use crate::spec::{CombineOrder, CombineRounding, FloatType};

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Combine {
    /// Width of a row.
    pub hidden_size: usize,
    /// What is summed.
    pub routed: Routed,
    /// Type of `expert_out`: f32, or bf16 of rows that are weighted and rounded to it.
    pub rows: FloatType,
    /// rho if it acts here, else 1.
    pub output_scale: f32,
    /// Whether a bias is added to the routed sum.
    pub output_bias: bool,
    /// What is added to that.
    pub shared: Option<SharedRows>,
    /// Where the sum is rounded to `model`.
    pub rounding: CombineRounding,
    /// T.
    pub model: FloatType,
    /// Type of the output.
    pub output: FloatType,
    /// Whether a thread sums eight columns of bf16 rows: CUDA.
    pub vectors: bool,
}

/// Threads of a block that sums vectors.
const VECTOR_THREADS: u32 = 64;

/// The routed part.
#[derive(Debug, Clone, PartialEq)]
pub enum Routed {
    /// `expert_out` [T * k, H] holds a row for each slot.
    Slots {
        /// Matrices.
        num_slots: usize,
        /// Those and the zero experts.
        selectable: usize,
        /// k.
        top_k: usize,
        /// Whether the routing weights multiply here.
        weighted: bool,
        /// Type of the rows that zero experts return; `None` if they return nothing, or are none.
        identity: Option<FloatType>,
        /// Order of the sum.
        order: CombineOrder,
        /// Whether slots are in order of their experts' ids, or `topk_ids` says that.
        slots_in_order: bool,
    },
    /// `expert_out` [T, H] is the sum.
    Row,
}

/// The shared experts' rows `shared_out` [T * mlps, H].
#[derive(Debug, Clone, PartialEq)]
pub struct SharedRows {
    /// Rows of a token; 0 where another device adds them.
    pub mlps: usize,
    /// What multiplies a row.
    pub factor: SharedFactor,
    /// Whether the sum is halved.
    pub average: bool,
}

/// What multiplies a shared expert's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedFactor {
    /// Nothing.
    One,
    /// `sigmoid(shared_gate[t])`.
    SigmoidOfGate,
    /// `shared_weights`.
    Share,
}

impl Combine {
    pub(super) fn source(&self) -> Source {
        let Self { hidden_size, routed, rows, output_scale, output_bias, shared, rounding, model, output, vectors } =
            self;
        let mut constants = vec![
            ("HIDDEN_SIZE", Value::U32(*hidden_size as u32)),
            ("ROUTED_SCALING_FACTOR", Value::F32(*output_scale)),
        ];
        let mut bindings = vec![PARAMS];
        let mut fragments = vec![shader!("fragments/params.wgsl")];
        let (expert_out, expert_value) = match rows {
            FloatType::Bf16 => ("array<u32>", shader!("fragments/expert_out_bf16.wgsl")),
            FloatType::F32 | FloatType::F16 => ("array<f32>", shader!("fragments/expert_out_f32.wgsl")),
        };
        fragments.push(expert_value);
        match rounding {
            CombineRounding::F32 => fragments.push(shader!("fragments/sum_f32.wgsl")),
            CombineRounding::WeightedRows => {
                fragments.extend(round_fragments(*model));
                fragments.push(shader!("fragments/sum_weighted_rows.wgsl"));
            }
            CombineRounding::EveryStep => {
                fragments.extend(round_fragments(*model));
                fragments.push(shader!("fragments/sum_every_step.wgsl"));
            }
        }
        match routed {
            Routed::Slots { num_slots, selectable, top_k, weighted, identity, order, slots_in_order } => {
                constants.push(("NUM_SLOTS", Value::U32(*num_slots as u32)));
                constants.push(("SELECTABLE", Value::U32(*selectable as u32)));
                constants.push(("TOP_K", Value::U32(*top_k as u32)));
                bindings.push(read("row_slots", "array<i32>"));
                if *weighted || identity.is_some() {
                    bindings.push(read("topk_weights", "array<f32>"));
                }
                match (order, slots_in_order) {
                    (CombineOrder::Slot, _) => fragments.push(shader!("fragments/order_slot.wgsl")),
                    (CombineOrder::Expert, true) => {
                        fragments.push(shader!("fragments/order_of_slot.wgsl"));
                        fragments.push(shader!("fragments/order_expert.wgsl"));
                    }
                    (CombineOrder::Expert, false) => {
                        bindings.push(read("topk_ids", "array<i32>"));
                        fragments.push(shader!("fragments/order_of_id.wgsl"));
                        fragments.push(shader!("fragments/order_expert.wgsl"));
                    }
                }
                fragments.push(match weighted {
                    true => shader!("fragments/output_weighted.wgsl"),
                    false => shader!("fragments/output_unweighted.wgsl"),
                });
                match identity {
                    None => fragments.push(shader!("fragments/zero_nothing.wgsl")),
                    Some(input) => {
                        bindings.push(read("rows", "array<u32>"));
                        fragments.extend(input_fragments(*input));
                        fragments.push(shader!("fragments/zero_identity.wgsl"));
                    }
                }
                fragments.push(shader!("fragments/routed_slots.wgsl"));
            }
            Routed::Row => fragments.push(shader!("fragments/routed_row.wgsl")),
        }
        bindings.push(read("expert_out", expert_out));
        match output_bias {
            true => {
                bindings.push(read("output_bias", "array<f32>"));
                fragments.push(shader!("fragments/output_bias_row.wgsl"));
            }
            false => fragments.push(shader!("fragments/output_bias_none.wgsl")),
        }
        match shared {
            None => fragments.push(shader!("fragments/shared_none.wgsl")),
            Some(SharedRows { mlps: 0, factor: _, average }) => {
                constants.push(("SHARED_AVERAGE", Value::F32(if *average { 0.5 } else { 1.0 })));
                fragments.push(shader!("fragments/shared_elsewhere.wgsl"));
            }
            Some(SharedRows { mlps, factor, average }) => {
                constants.push(("SHARED_MLPS", Value::U32(*mlps as u32)));
                constants.push(("SHARED_AVERAGE", Value::F32(if *average { 0.5 } else { 1.0 })));
                bindings.push(read("shared_out", "array<f32>"));
                match factor {
                    SharedFactor::One => fragments.push(shader!("fragments/shared_gate_none.wgsl")),
                    SharedFactor::SigmoidOfGate => {
                        bindings.push(read("shared_gate", "array<f32>"));
                        fragments.push(shader!("fragments/keep_nan.wgsl"));
                        fragments.push(shader!("fragments/sigmoid.wgsl"));
                        fragments.push(shader!("fragments/shared_gate_sigmoid.wgsl"));
                    }
                    SharedFactor::Share => {
                        bindings.push(read("shared_weights", "array<f32>"));
                        fragments.push(shader!("fragments/shared_gate_joint.wgsl"));
                    }
                }
                fragments.push(shader!("fragments/shared_rows.wgsl"));
            }
        }
        match output {
            FloatType::F32 => fragments.push(shader!("fragments/store_f32.wgsl")),
            FloatType::F16 => {
                fragments.extend([shader!("fragments/encode_f16.wgsl"), shader!("fragments/store_f16.wgsl")]);
            }
            FloatType::Bf16 => {
                fragments.extend([shader!("fragments/encode_bf16.wgsl"), shader!("fragments/store_bf16.wgsl")]);
            }
        }
        fragments.push(match vectors {
            true => {
                constants.extend(cuda_blocks(VECTOR_THREADS));
                shader!("combine/vectors.cu")
            }
            false => shader!("combine/slots.wgsl"),
        });
        bindings.push(write("out", "array<u32>"));
        Source { constants, bindings, fragments: unique(fragments) }
    }

    /// Columns of a token that a workgroup has.
    pub fn workgroup_columns(&self) -> usize {
        if self.vectors { 8 * VECTOR_THREADS as usize } else { 64 }
    }

    /// The same sum of rows that are weighted and rounded to bf16 already; none where weights do not act here.
    pub fn of_weighted_rows(&self) -> Option<Self> {
        let routed = match self.routed {
            Routed::Slots { num_slots, selectable, top_k, weighted: true, identity: None, order, slots_in_order } => {
                Routed::Slots { num_slots, selectable, top_k, weighted: false, identity: None, order, slots_in_order }
            }
            Routed::Slots {
                num_slots: _,
                selectable: _,
                top_k: _,
                weighted: true | false,
                identity: _,
                order: _,
                slots_in_order: _,
            }
            | Routed::Row => return None,
        };
        let vectors = self.hidden_size.is_multiple_of(8) && self.output == FloatType::Bf16;
        Some(Self { routed, rows: FloatType::Bf16, vectors, ..self.clone() })
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let tokens = arguments.tokens()?;
        let values = tokens * self.hidden_size;
        let words = arguments.read("expert_out")?;
        let expert_value = |at: usize| match self.rows {
            FloatType::Bf16 => decode_value(words, FloatType::Bf16, at),
            FloatType::F32 | FloatType::F16 => f32::from_bits(words[at]),
        };
        let bias = if self.output_bias { Some(arguments.read_f32("output_bias")?) } else { None };
        let routed = SlotRows::read(&self.routed, arguments)?;
        let shared = match &self.shared {
            None => None,
            Some(SharedRows { mlps: 0, factor: _, average: _ }) => Some((&[][..], None)),
            Some(SharedRows { mlps: _, factor, average: _ }) => {
                let factors: Option<&[f32]> = match factor {
                    SharedFactor::One => None,
                    SharedFactor::SigmoidOfGate => Some(arguments.read_f32("shared_gate")?),
                    SharedFactor::Share => Some(arguments.read_f32("shared_weights")?),
                };
                Some((arguments.read_f32("shared_out")?, factors))
            }
        };
        let value = |at: usize| {
            let (token, col) = (at / self.hidden_size, at % self.hidden_size);
            let sum = match &routed {
                None => expert_value(at),
                Some(rows) if rows.missed(token) => return f32::NAN,
                Some(rows) => {
                    let (mut sum, mut last) = (0.0, None);
                    while let Some(slot) = rows.next(token, last) {
                        if let Some((weight, from)) = rows.of(slot) {
                            let value = match from {
                                SlotFrom::Expert(row) => expert_value(row * self.hidden_size + col),
                                SlotFrom::Identity(input, words) => decode_value(words, input, at),
                            };
                            sum = self.step(sum + self.weighted(weight, value));
                        }
                        last = Some(slot);
                    }
                    sum
                }
            };
            let mut sum = self.step(self.output_scale * sum);
            if let Some(bias) = bias {
                sum = self.step(sum + bias[col]);
            }
            if let (Some(SharedRows { mlps, factor, average }), Some((rows, factors))) = (&self.shared, &shared) {
                for mlp in token * mlps..(token + 1) * mlps {
                    let factor = match (factor, factors) {
                        (SharedFactor::SigmoidOfGate, Some(gates)) => numerics::sigmoid(gates[mlp]),
                        (SharedFactor::Share, Some(shares)) => shares[mlp],
                        (SharedFactor::One, _) | (_, None) => 1.0,
                    };
                    let row = self.step(rows[mlp * self.hidden_size + col]);
                    sum = self.step(sum + self.step(self.step(factor) * row));
                }
                sum = self.step(if *average { 0.5 * sum } else { sum });
            }
            sum
        };
        let per_word = 4 / self.output.bytes();
        let out = &mut arguments.write("out")?[..values.div_ceil(per_word)];
        out.par_iter_mut().enumerate().for_each(|(word, out)| {
            *out = (0..per_word)
                .filter(|i| word * per_word + i < values)
                .map(|i| encode(self.output, value(word * per_word + i)) << (16 * i))
                .fold(0, |word, bits| word | bits);
        });
        Ok(())
    }

    /// Twin: shaders/fragments/sum_*.wgsl
    fn step(&self, value: f32) -> f32 {
        match self.rounding {
            CombineRounding::F32 | CombineRounding::WeightedRows => value,
            CombineRounding::EveryStep => numerics::round_to(self.model, value),
        }
    }

    fn weighted(&self, weight: f32, value: f32) -> f32 {
        let round = |value| numerics::round_to(self.model, value);
        match self.rounding {
            CombineRounding::F32 => weight * value,
            CombineRounding::WeightedRows => round(weight * value),
            CombineRounding::EveryStep => round(weight * round(value)),
        }
    }
}

/// What the slots of tokens say. Asked for each value, as the kernel does: no list of them is kept.
struct SlotRows<'a> {
    num_slots: usize,
    selectable: usize,
    top_k: usize,
    weighted: bool,
    row_slots: &'a [i32],
    /// What slots are ordered by; their place without it.
    order: Option<&'a [i32]>,
    weights: Option<&'a [f32]>,
    /// What zero experts return.
    identity: Option<(FloatType, &'a [u32])>,
}

enum SlotFrom<'a> {
    /// Row of `expert_out`.
    Expert(usize),
    /// The token's own row.
    Identity(FloatType, &'a [u32]),
}

impl<'a> SlotRows<'a> {
    fn read(routed: &Routed, arguments: &Arguments<'a>) -> Result<Option<Self>> {
        let (num_slots, selectable, top_k, weighted, identity, order, slots_in_order) = match *routed {
            Routed::Row => return Ok(None),
            Routed::Slots { num_slots, selectable, top_k, weighted, identity, order, slots_in_order } => {
                (num_slots, selectable, top_k, weighted, identity, order, slots_in_order)
            }
        };
        let row_slots = arguments.read_i32("row_slots")?;
        let order = match order {
            CombineOrder::Slot => None,
            CombineOrder::Expert if slots_in_order => Some(row_slots),
            CombineOrder::Expert => Some(arguments.read_i32("topk_ids")?),
        };
        let needs_weights = weighted || identity.is_some();
        let weights = if needs_weights { Some(arguments.read_f32("topk_weights")?) } else { None };
        let identity = match identity {
            None => None,
            Some(input) => Some((input, arguments.read("rows")?)),
        };
        Ok(Some(Self { num_slots, selectable, top_k, weighted, row_slots, order, weights, identity }))
    }

    /// Whether a token has a slot that nobody has.
    fn missed(&self, token: usize) -> bool {
        let in_range = |slot: i32| usize::try_from(slot).is_ok_and(|slot| slot < self.selectable);
        self.slots(token).any(|slot| self.row_slots[slot] != -1 && !in_range(self.row_slots[slot]))
    }

    fn slots(&self, token: usize) -> Range<usize> {
        token * self.top_k..(token + 1) * self.top_k
    }

    /// The slot behind `last` in the order of the sum. Twin: shaders/fragments/order_*.wgsl
    fn next(&self, token: usize, last: Option<usize>) -> Option<usize> {
        match self.order {
            None => {
                last.map_or(Some(token * self.top_k), |slot| Some(slot + 1)).filter(|&s| self.slots(token).contains(&s))
            }
            Some(ids) => {
                let key = |slot: usize| (ids[slot], slot);
                let behind = |slot: &usize| last.is_none_or(|last| key(*slot) > key(last));
                self.slots(token).filter(behind).min_by_key(|slot| key(*slot))
            }
        }
    }

    /// What a slot adds, and with which weight.
    fn of(&self, slot: usize) -> Option<(f32, SlotFrom<'a>)> {
        let weight = || self.weights.map_or(1.0, |weights| weights[slot]);
        match (usize::try_from(self.row_slots[slot]), self.identity) {
            (Ok(chosen), _) if chosen < self.num_slots => {
                Some((if self.weighted { weight() } else { 1.0 }, SlotFrom::Expert(slot)))
            }
            (Ok(_), Some((input, words))) => Some((weight(), SlotFrom::Identity(input, words))),
            (Ok(_), None) | (Err(_), _) => None,
        }
    }
}

/// Bits of `value` rounded to nearest even. Twin: shaders/fragments/store_*.wgsl
fn encode(output: FloatType, value: f32) -> u32 {
    match output {
        FloatType::F32 => value.to_bits(),
        FloatType::F16 => u32::from(half::f16::from_f32(value).to_bits()),
        FloatType::Bf16 => u32::from(half::bf16::from_f32(value).to_bits()),
    }
}
