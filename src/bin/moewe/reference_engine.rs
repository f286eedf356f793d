//! The reference as an engine: the same code token by token, on all threads.

use moewe::host::Outcome;
use moewe::reference::{self, Inputs, Routed};
use moewe::{MoeSpec, MoeWeights, Result, RouterWeights};
use rayon::prelude::*;

use crate::engine::{Engine, Memory, Runner, Timing, Work};

/// The reference.
pub struct Reference;

impl Engine for Reference {
    fn plan<'a>(&'a self, spec: &'a MoeSpec, work: Work<'a>, _max_tokens: usize) -> Result<Box<dyn Runner + 'a>> {
        // A call without tokens checks what each call with some would.
        let nothing = Inputs { hidden_states: &[], token_ids: None, logits: None };
        match work {
            Work::Layer(weights) => reference::layer(spec, weights, nothing).map(|_| ())?,
            Work::Routing(router) => reference::route(spec, router, nothing).map(|_| ())?,
        }
        Ok(Box::new(Planned { spec, work }))
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
                let Routed { logits: _, topk_ids, topk_weights } = route(self.spec, router, inputs)?;
                Ok(Outcome { topk_ids, topk_weights, output: vec![] })
            }
        }
    }

    fn timing(&self, _tokens: usize) -> Result<Option<Timing>> {
        Ok(None)
    }

    fn memory(&self) -> Option<Memory> {
        None
    }
}

/// [`reference::route`], tokens in parallel: no token sees another.
pub fn route(spec: &MoeSpec, router: &RouterWeights<'_>, inputs: &Inputs<'_>) -> Result<Routed> {
    let parts: Vec<Routed> =
        rows(spec, inputs).map(|row| reference::route(spec, router, row)).collect::<Result<_>>()?;
    let mut all = Routed { logits: vec![], topk_ids: vec![], topk_weights: vec![] };
    for Routed { logits, topk_ids, topk_weights } in parts {
        all.logits.extend(logits);
        all.topk_ids.extend(topk_ids);
        all.topk_weights.extend(topk_weights);
    }
    Ok(all)
}

/// [`reference::layer`], tokens in parallel.
pub fn layer(spec: &MoeSpec, weights: &MoeWeights<'_>, inputs: &Inputs<'_>) -> Result<Outcome> {
    let parts: Vec<reference::Layer> =
        rows(spec, inputs).map(|row| reference::layer(spec, weights, row)).collect::<Result<_>>()?;
    let mut all = Outcome { topk_ids: vec![], topk_weights: vec![], output: vec![] };
    for reference::Layer { routed: Routed { logits: _, topk_ids, topk_weights }, output } in parts {
        all.topk_ids.extend(topk_ids);
        all.topk_weights.extend(topk_weights);
        all.output.extend(output);
    }
    Ok(all)
}

/// One input a token. What is left of a broken row stays a row, for the reference to refuse.
fn rows<'a>(spec: &MoeSpec, inputs: &Inputs<'a>) -> impl IndexedParallelIterator<Item = Inputs<'a>> {
    let Inputs { hidden_states, token_ids, logits } = *inputs;
    let outputs = spec.router_outputs();
    hidden_states.par_chunks(spec.hidden_size.max(1)).enumerate().map(move |(token, hidden_states)| Inputs {
        hidden_states,
        token_ids: token_ids.map(|ids| ids.get(token..=token).unwrap_or(&[])),
        logits: logits.map(|logits| logits.get(token * outputs..(token + 1) * outputs).unwrap_or(&[])),
    })
}
