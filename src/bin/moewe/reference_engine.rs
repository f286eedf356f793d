//! The reference as an engine: the same code token by token, on all threads.

use moewe::conformance;
use moewe::host::Outcome;
use moewe::reference::{self, Inputs, Routed};
use moewe::schedule::{Decision, Schedule};
use moewe::spec::SharedExperts;
use moewe::{MoeSpec, MoeWeights, Result, RouterWeights, Unsupported};
use rayon::prelude::*;

use crate::bench::Bench;
use crate::engine::{Engine, Memory, Runner, Timing, Work};
use crate::inputs;

/// The reference.
pub struct Reference;

impl Engine for Reference {
    fn conformance(&self, _progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Option<Vec<conformance::Outcome>>> {
        Ok(None)
    }

    fn schedule(&self, spec: &MoeSpec, _max_tokens: usize) -> Result<Option<Schedule>> {
        reference::supports(spec).map(|()| None)
    }

    fn plan<'a>(&'a self, spec: &'a MoeSpec, work: Work<'a>, _max_tokens: usize) -> Result<Box<dyn Runner + 'a>> {
        // A call without tokens checks what each call with some would.
        let nothing = Inputs { expert_hidden_states: Some(&[]), ..Inputs::of(&[]) };
        match work {
            Work::Layer(weights) => reference::layer(spec, weights, nothing).map(|_| ())?,
            Work::Routing(router) => reference::route(spec, router, nothing).map(|_| ())?,
        }
        Ok(Box::new(Planned { spec, work }))
    }

    fn bench<'a>(&'a self) -> Result<Box<dyn Bench + 'a>> {
        let (field, value) = ("backend".into(), "\"reference\"".into());
        let because = "it judges, one token at a time, and has no weights on a device; time cpu or wgpu".into();
        Err(Unsupported { backend: "reference".into(), field, value, because }.into())
    }
}

struct Planned<'a> {
    spec: &'a MoeSpec,
    work: Work<'a>,
}

impl Runner for Planned<'_> {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Outcome> {
        match self.work {
            Work::Layer(weights) => layer(self.spec, weights, inputs),
            Work::Routing(router) => {
                let Routed { logits: _, topk_ids, topk_weights, shared_weights, router_states } =
                    route(self.spec, router, inputs)?;
                Ok(Outcome { topk_ids, topk_weights, shared_weights, router_states, output: vec![] })
            }
        }
    }

    fn input_codes(&self, inputs: &Inputs<'_>) -> Result<(Vec<u8>, Vec<f32>)> {
        match self.work {
            Work::Layer(weights) => reference::input_codes(self.spec, weights, *inputs),
            Work::Routing(_) => Ok((vec![], vec![])),
        }
    }

    fn timing(&self, _tokens: usize) -> Result<Option<Timing>> {
        Ok(None)
    }

    fn memory(&self) -> Option<Memory> {
        None
    }

    fn decisions(&self) -> Vec<Decision> {
        vec![]
    }
}

/// [`reference::route`], tokens in parallel: no token sees another.
pub fn route(spec: &MoeSpec, router: &RouterWeights<'_>, inputs: &Inputs<'_>) -> Result<Routed> {
    let parts: Vec<Routed> =
        rows(spec, inputs).map(|row| reference::route(spec, router, row)).collect::<Result<_>>()?;
    let mut all = nothing();
    for part in parts {
        append(&mut all, part);
    }
    Ok(all)
}

fn nothing() -> Routed {
    Routed { logits: vec![], topk_ids: vec![], topk_weights: vec![], shared_weights: vec![], router_states: vec![] }
}

fn append(all: &mut Routed, part: Routed) {
    let Routed { logits, topk_ids, topk_weights, shared_weights, router_states } = part;
    all.logits.extend(logits);
    all.topk_ids.extend(topk_ids);
    all.topk_weights.extend(topk_weights);
    all.shared_weights.extend(shared_weights);
    all.router_states.extend(router_states);
}

/// Whether a token's output depends on the other tokens of the call.
pub fn tokens_share_scales(spec: &MoeSpec) -> bool {
    let shared = spec.shared.as_ref().map(|SharedExperts { mlp, gate: _, combination: _ }| mlp);
    std::iter::once(&spec.experts).chain(shared).any(|mlp| mlp.activation_quant.shares_scale())
}

/// [`reference::layer`], tokens in parallel where they can be.
pub fn layer(spec: &MoeSpec, weights: &MoeWeights<'_>, inputs: &Inputs<'_>) -> Result<Outcome> {
    let parts: Vec<reference::Layer> = match tokens_share_scales(spec) {
        true => vec![reference::layer(spec, weights, *inputs)?],
        false => rows(spec, inputs).map(|row| reference::layer(spec, weights, row)).collect::<Result<_>>()?,
    };
    let (mut all, mut output) = (nothing(), vec![]);
    for part in parts {
        append(&mut all, part.routed);
        output.extend(part.output);
    }
    let Routed { logits: _, topk_ids, topk_weights, shared_weights, router_states } = all;
    Ok(Outcome { topk_ids, topk_weights, shared_weights, router_states, output })
}

/// One input a token. What is left of a broken row stays a row, for the reference to refuse.
fn rows<'a>(spec: &MoeSpec, inputs: &Inputs<'a>) -> impl IndexedParallelIterator<Item = Inputs<'a>> {
    let Inputs {
        hidden_states,
        token_ids,
        logits,
        expert_hidden_states,
        router_states,
        adapter_ids,
        counts,
        row_weights,
    } = *inputs;
    let (hidden_size, outputs) = (spec.hidden_size.max(1), spec.router_outputs());
    let state_size = inputs::state_size(&spec.router);
    fn row<T>(values: Option<&[T]>, width: usize, token: usize) -> Option<&[T]> {
        values.map(|values| values.get(token * width..(token + 1) * width).unwrap_or(&[]))
    }
    hidden_states.par_chunks(hidden_size).enumerate().map(move |(token, hidden_states)| Inputs {
        hidden_states,
        token_ids: row(token_ids, 1, token),
        logits: row(logits, outputs, token),
        expert_hidden_states: row(expert_hidden_states, hidden_size, token),
        router_states: row(router_states, state_size, token),
        adapter_ids: row(adapter_ids, 1, token),
        // No checkpoint has a batched entry; one would be refused here, as a row is no whole call of it.
        counts,
        row_weights: row(row_weights, 1, token),
    })
}
