//! Layers of synthetic weights on a backend: checked, then timed.

use std::time::Instant;

use moewe::conformance::synthetic;
use moewe::host::{self, Host};
use moewe::schedule::Options;
use moewe::{Bound, Io, MoeSpec, Plan, Result, Schedule, Scratch, Tokens};
use rayon::prelude::*;

use crate::engine::Faults;

/// A backend that can be timed.
pub trait Bench {
    /// Bytes a second that it reads at best.
    fn read_rate(&self) -> Result<f64>;
    /// A layer of synthetic weights for up to `max_tokens` tokens.
    fn layer<'a>(&'a self, spec: &'a MoeSpec, max_tokens: usize, options: &Options) -> Result<Box<dyn Layer + 'a>>;
}

/// A layer that is ready.
pub trait Layer {
    /// What it runs.
    fn schedule(&self) -> &Schedule;
    /// Computes up to `inputs` inputs of `tokens` tokens, the first two at least, and times them if `accept` finds the `sampled` rows right.
    fn measure(
        &self,
        tokens: usize,
        inputs: usize,
        sampled: &[Place],
        accept: &mut dyn FnMut(&[Row]) -> bool,
    ) -> Result<Measured>;
}

/// (input, token).
pub type Place = (usize, usize);

/// One row that a layer has computed.
pub struct Row {
    /// Of which token.
    pub place: Place,
    /// The experts it chose.
    pub topk_ids: Vec<i32>,
    /// [H].
    pub output: Vec<f32>,
}

/// What was seen.
pub struct Measured {
    /// Distinct experts that each input chose.
    pub distinct: Vec<usize>,
    /// Seconds of each run; none if the rows were wrong.
    pub seconds: Vec<f64>,
    /// Launches of a call.
    pub dispatches: usize,
}

/// A backend of the library.
pub struct OnDevice<'a, B> {
    /// The backend.
    pub backend: &'a B,
    /// What its device reports outside of calls.
    pub faults: &'a Faults,
}

impl<B: Host + Clone> OnDevice<'_, B> {
    fn check<T>(&self, result: Result<T>) -> Result<T> {
        self.faults.check(self.backend.facts().backend)?;
        result
    }
}

impl<B: Host + Clone> Bench for OnDevice<'_, B> {
    fn read_rate(&self) -> Result<f64> {
        /// More than any cache has, and little enough for a small device.
        const LEAST: u64 = 256 << 20;
        /// So much that the start of a read is nothing beside it.
        const MOST: u64 = 2 << 30;
        let first = self.check(synthetic::read_rate(self.backend, LEAST))?;
        // Where that took less than a hundredth of a second more is read, if there is the memory for it.
        match first * 0.01 > LEAST as f64 {
            true => Ok(self.check(synthetic::read_rate(self.backend, MOST)).map_or(first, |rate| rate.max(first))),
            false => Ok(first),
        }
    }

    fn layer<'a>(&'a self, spec: &'a MoeSpec, max_tokens: usize, options: &Options) -> Result<Box<dyn Layer + 'a>> {
        let plan = self.check(synthetic::plan(self.backend.clone(), spec, max_tokens, options))?;
        let scratch = self.check(Scratch::new(self.backend, &plan.scratch_layout()))?;
        Ok(Box::new(Planned { on: self, spec, plan, scratch }))
    }
}

struct Planned<'a, B: Host> {
    on: &'a OnDevice<'a, B>,
    spec: &'a MoeSpec,
    plan: Plan<B>,
    scratch: Scratch<B>,
}

impl<B: Host + Clone> Layer for Planned<'_, B> {
    fn schedule(&self) -> &Schedule {
        self.plan.schedule()
    }

    fn measure(
        &self,
        tokens: usize,
        inputs: usize,
        sampled: &[Place],
        accept: &mut dyn FnMut(&[Row]) -> bool,
    ) -> Result<Measured> {
        let result = self.measured(tokens, inputs, sampled, accept);
        self.on.check(result)
    }
}

impl<B: Host + Clone> Planned<'_, B> {
    fn measured(
        &self,
        tokens: usize,
        inputs: usize,
        sampled: &[Place],
        accept: &mut dyn FnMut(&[Row]) -> bool,
    ) -> Result<Measured> {
        let (host, spec) = (self.on.backend, self.spec);
        let (width, top_k) = (spec.hidden_size, spec.top_k);
        let (mut bounds, mut distinct, mut rows) = (vec![], vec![], vec![]);
        // Where runs take seconds two inputs are enough: no cache keeps weights for so long.
        const SLOW: f64 = 4.0;
        let (mut estimate, begun) = (f64::INFINITY, Instant::now());
        for input in 0..inputs {
            if input > 1 && begun.elapsed().as_secs_f64() > SLOW {
                break;
            }
            let (bound, output) = self.bind(input, tokens)?;
            let start = Instant::now();
            let mut encoder = host.encoder();
            bound.record(&mut encoder, &Tokens::Host(tokens))?;
            host.submit(encoder)?;
            estimate = start.elapsed().as_secs_f64().min(estimate);
            let ids = self.scratch.buffer("topk_ids").map_or_else(|| Ok(vec![]), |buffer| host.read(buffer))?;
            let ids: Vec<i32> = ids.into_iter().take(tokens * top_k).map(|id| id as i32).collect();
            let mut chosen = ids.clone();
            chosen.sort_unstable();
            chosen.dedup();
            distinct.push(chosen.len());
            let here: Vec<Place> = sampled.iter().copied().filter(|place| place.0 == input).collect();
            if !here.is_empty() {
                let values = host::decode(spec.precision.output, &host.read(&output)?, tokens * width);
                rows.extend(here.into_iter().map(|place| Row {
                    place,
                    topk_ids: ids.iter().skip(place.1 * top_k).take(top_k).copied().collect(),
                    output: values.iter().skip(place.1 * width).take(width).copied().collect(),
                }));
            }
            bounds.push(bound);
        }
        let seconds = if accept(&rows) { self.time(&bounds, tokens, estimate)? } else { vec![] };
        Ok(Measured { distinct, seconds, dispatches: self.dispatches(&bounds, tokens) })
    }

    /// Buffers of an input's own; the output's is returned too.
    fn bind(&self, input: usize, tokens: usize) -> Result<(Bound<B>, B::Buffer)> {
        let (host, spec) = (self.on.backend, self.spec);
        let rows = |row: &(dyn Fn(usize) -> Vec<f32> + Sync)| -> Vec<f32> {
            (0..tokens).into_par_iter().flat_map_iter(row).collect()
        };
        let hidden_states = rows(&|token| synthetic::hidden_states(spec, input, token));
        let x = host.upload("hidden_states", &host::encode(spec.precision.input, &hidden_states))?;
        let logits = rows(&|token| synthetic::logits(spec, input, token));
        let logits = host.upload("logits", bytemuck::cast_slice(&logits))?;
        let bytes = (hidden_states.len() * spec.precision.output.bytes()).next_multiple_of(4);
        let output = host.create_buffer("output", bytes as u64, false)?;
        let io = Io { output: Some(&output), logits: Some(&logits), ..Io::of(&x) };
        Ok((self.plan.bind(&io, &self.scratch)?, output))
    }

    /// Rotates through the inputs, so that weights come from memory and not from a cache. The first runs took
    /// `estimate` seconds each by the host's clock.
    fn time(&self, bounds: &[Bound<B>], tokens: usize, estimate: f64) -> Result<Vec<f64>> {
        /// Seconds that the runs may take, and those before, in which a clock rises.
        const BUDGET: f64 = 1.0;
        const WARM_UP: f64 = 0.3;
        /// Runs at least, and at most.
        const RUNS: [f64; 2] = [3.0, 200.0];
        let record = |runs: f64| {
            let one = &mut |encoder: &mut B::Encoder, at: usize| bounds[at].record(encoder, &Tokens::Host(tokens));
            self.on.backend.time_rounds(bounds.len(), (runs as usize).div_ceil(bounds.len()), one)
        };
        if estimate < WARM_UP {
            record((WARM_UP / estimate).min(RUNS[1]))?;
        }
        record((BUDGET / estimate).clamp(RUNS[0], RUNS[1]))
    }

    fn dispatches(&self, bounds: &[Bound<B>], tokens: usize) -> usize {
        let chunk = self.plan.schedule().chunk_tokens;
        let Some(bound) = bounds.first() else { return 0 };
        let steps = |tokens: usize| if tokens == 0 { 0 } else { bound.steps(tokens).len() };
        tokens / chunk * steps(chunk) + steps(tokens % chunk)
    }
}
