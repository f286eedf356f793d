//! Whatever computes a layer, behind one interface.

use std::sync::{Arc, Mutex, PoisonError};

use crate::bench::{Bench, OnDevice};
use crate::inputs;
use crate::progress::Bar;
use moewe::conformance;
use moewe::host::{Host, Outcome, Session};
use moewe::kernels::{Operation, RowScale};
use moewe::reference::Inputs;
use moewe::schedule::{self, Contents, Decision, Options, Schedule};
use moewe::{Error, MoeSpec, MoeWeights, Plan, Result, RouterWeights, Scope};

/// What is asked of an engine.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    /// The whole layer.
    Layer(&'a MoeWeights<'a>),
    /// Ids and weights only.
    Routing(&'a RouterWeights<'a>),
}

/// Computes layers.
pub trait Engine {
    /// Makes a layer ready for up to `max_tokens` tokens.
    fn plan<'a>(&'a self, spec: &'a MoeSpec, work: Work<'a>, max_tokens: usize) -> Result<Box<dyn Runner + 'a>>;
    /// What times layers of synthetic weights.
    fn bench<'a>(&'a self) -> Result<Box<dyn Bench + 'a>>;
    /// What a plan would run, without planning; `None` for an engine without steps.
    fn schedule(&self, spec: &MoeSpec, max_tokens: usize) -> Result<Option<Schedule>>;
    /// Drops each field of the spec on purpose; `None` for an engine that has nothing to drop it from. `progress`
    /// hears how many fields of how many are done.
    fn conformance(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Option<Vec<conformance::Outcome>>>;
}

/// A layer that is ready.
pub trait Runner {
    /// Computes it.
    fn run(&self, inputs: &Inputs<'_>) -> Result<Outcome>;
    /// The codes [T, H] and scales [T, groups] of what the routed experts read, of the call before, where
    /// they are quantised by token.
    fn input_codes(&self, inputs: &Inputs<'_>) -> Result<(Vec<u8>, Vec<f32>)>;
    /// How long each step takes; `None` for an engine without steps.
    fn timing(&self, tokens: usize) -> Result<Option<Timing>>;
    /// What it takes; `None` for an engine that copies nothing.
    fn memory(&self) -> Option<Memory>;
    /// What was chosen among ways that mean the same; nothing by an engine without choices.
    fn decisions(&self) -> Vec<Decision>;
}

/// Seconds of each step, in order.
#[derive(Debug, Clone)]
pub struct Timing {
    /// (name, seconds).
    pub stages: Vec<(String, f64)>,
    /// How it was measured.
    pub method: String,
}

/// Bytes on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Packed weights and tables.
    pub weights: u64,
    /// Between the steps.
    pub scratch: u64,
    /// Hidden states, token ids and output.
    pub io: u64,
}

impl Memory {
    /// Of a schedule.
    pub fn of(schedule: &Schedule) -> Self {
        Self { weights: schedule.weight_bytes(), scratch: schedule.scratch_bytes(), io: io_bytes(schedule) }
    }
}

/// Each step is timed so often; the median counts.
const RUNS: usize = 5;

/// Errors that a device reported outside of any call.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Mutex<Vec<String>>>);

impl Faults {
    /// Notes one.
    #[cfg(feature = "wgpu")]
    pub fn push(&self, fault: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }

    /// Fails with those that have come since.
    pub fn check(&self, backend: &'static str) -> Result<()> {
        let faults = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        match faults.is_empty() {
            true => Ok(()),
            false => Err(Error::Device { backend, operation: "running the layer".into(), reason: faults.join("; ") }),
        }
    }
}

/// A backend of the library.
pub struct Device<B> {
    /// The backend.
    pub backend: B,
    /// What its device reports outside of calls.
    pub faults: Faults,
    /// Bound on one weight buffer.
    pub segment_bytes: Option<u64>,
}

impl<B> Device<B> {
    fn options(&self) -> Options {
        Options { segment_bytes: self.segment_bytes, ..Options::AUTO }
    }
}

impl<B: Host + Clone + Sync> Engine for Device<B> {
    fn conformance(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Option<Vec<conformance::Outcome>>> {
        let outcomes = conformance::run(&self.backend, progress);
        self.faults.check(self.backend.facts().backend)?;
        Ok(Some(outcomes))
    }

    fn schedule(&self, spec: &MoeSpec, max_tokens: usize) -> Result<Option<Schedule>> {
        schedule::lower(spec, Scope::Layer, max_tokens, &self.backend.facts(), &self.options()).map(Some)
    }

    fn plan<'a>(&'a self, spec: &'a MoeSpec, work: Work<'a>, max_tokens: usize) -> Result<Box<dyn Runner + 'a>> {
        let (options, backend) = (self.options(), self.backend.clone());
        let plan = match work {
            Work::Layer(weights) => {
                let bar = Bar::new();
                let mut progress = |done, all| bar.at("packing and writing weights", done, all);
                Plan::with_progress(backend, spec, weights, max_tokens, &options, &mut progress)?
            }
            Work::Routing(router) => Plan::routing(backend, spec, router, max_tokens, &options)?,
        };
        let session = Session::new(plan, spec)?;
        let device =
            Planned { session, spec, whole: work.is_layer(), name: self.backend.facts().backend, faults: &self.faults };
        device.faults.check(device.name)?;
        Ok(Box::new(device))
    }

    fn bench<'a>(&'a self) -> Result<Box<dyn Bench + 'a>> {
        Ok(Box::new(OnDevice { backend: &self.backend, faults: &self.faults }))
    }
}

impl Work<'_> {
    fn is_layer(&self) -> bool {
        match self {
            Self::Layer(_) => true,
            Self::Routing(_) => false,
        }
    }
}

struct Planned<'a, B: Host> {
    session: Session<B>,
    spec: &'a MoeSpec,
    whole: bool,
    name: &'static str,
    faults: &'a Faults,
}

impl<B: Host> Runner for Planned<'_, B> {
    fn run(&self, inputs: &Inputs<'_>) -> Result<Outcome> {
        let outcome = self.session.run(inputs);
        self.faults.check(self.name)?;
        let outcome = outcome?;
        expect_lengths(self.spec, inputs, &outcome, self.whole)?;
        Ok(outcome)
    }

    fn input_codes(&self, inputs: &Inputs<'_>) -> Result<(Vec<u8>, Vec<f32>)> {
        let tokens = inputs.hidden_states.len() / self.spec.hidden_size;
        let lacks = |what: &'static str| Error::invalid("input_codes", what, "a step experts.input.quantize", "none");
        let step = self.session.bound().steps(tokens).iter().find(|step| step.name == "experts.input.quantize");
        let Some(Operation::Quantize(quantize)) = step.map(|step| &step.operation) else {
            return Err(lacks("no such step"));
        };
        let RowScale::Span { group: _, rule: _, scale: _, layout } = quantize.scale else {
            return Err(lacks("one scale a row"));
        };
        let read = |name: &str| {
            let buffer = self.session.scratch().buffer(name).ok_or_else(|| lacks("no such buffer"))?;
            self.session.plan().backend().read(buffer)
        };
        let (words, scales) = (read("experts.input.codes")?, read("experts.input.scales")?);
        let (cols, [groups, _]) = (quantize.cols, quantize.spans());
        let row_words = cols.div_ceil(4);
        let code = |(row, col): (usize, usize)| (words[row * row_words + col / 4] >> (8 * (col % 4))) as u8;
        let codes = (0..tokens).flat_map(|row| (0..cols).map(move |col| (row, col))).map(code).collect();
        let scale = |(row, group): (usize, usize)| layout.read(&scales, row, group, groups);
        Ok((codes, (0..tokens).flat_map(|row| (0..groups).map(move |group| (row, group))).map(scale).collect()))
    }

    fn timing(&self, tokens: usize) -> Result<Option<Timing>> {
        let timed = self.session.time_steps(tokens, RUNS);
        self.faults.check(self.name)?;
        let (seconds, method) = timed?;
        let names = self.session.bound().steps(tokens).iter().map(|step| step.name.clone());
        Ok(Some(Timing { stages: names.zip(seconds).collect(), method: format!("{method}, median of {RUNS}") }))
    }

    fn decisions(&self) -> Vec<Decision> {
        self.session.plan().schedule().decisions.clone()
    }

    fn memory(&self) -> Option<Memory> {
        Some(Memory::of(self.session.plan().schedule()))
    }
}

/// A result of another length would be compared in part.
fn expect_lengths(spec: &MoeSpec, inputs: &Inputs<'_>, outcome: &Outcome, whole: bool) -> Result<()> {
    let Outcome { topk_ids, topk_weights, shared_weights, router_states, output } = outcome;
    let tokens = inputs.hidden_states.len() / spec.hidden_size;
    let slots = tokens * spec.top_k;
    let values = if whole { inputs.hidden_states.len() } else { 0 };
    for (field, found, expected) in [
        ("topk_ids", topk_ids.len(), slots),
        ("topk_weights", topk_weights.len(), slots),
        ("shared_weights", shared_weights.len(), tokens * spec.joint_shares()),
        ("router_states", router_states.len(), tokens * inputs::state_size(&spec.router)),
        ("output", output.len(), values),
    ] {
        if found != expected {
            let remedy = "this is a fault of the backend";
            return Err(Error::invalid(field, format!("{found} values"), format!("{expected} values"), remedy));
        }
    }
    Ok(())
}

fn io_bytes(schedule: &Schedule) -> u64 {
    let callers = schedule.buffers.iter().filter(|buffer| match buffer.contents {
        Contents::HiddenStates
        | Contents::TokenIds
        | Contents::ExpertHiddenStates
        | Contents::AdapterIds
        | Contents::Counts
        | Contents::RowWeights
        | Contents::GivenLogits
        | Contents::PreviousRouterStates
        | Contents::Output => true,
        Contents::TopkIds
        | Contents::TopkWeights
        | Contents::RouterStates
        | Contents::SharedWeights
        | Contents::Scratch
        | Contents::Params
        | Contents::Segment { matrix: _, segment: _ }
        | Contents::Spans { matrix: _, segment: _ }
        | Contents::Table(_) => false,
    });
    callers.map(|buffer| buffer.bytes).sum()
}
