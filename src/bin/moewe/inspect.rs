//! `moewe inspect`: what a checkpoint's layers compute, what of them is here, and what each backend makes of them.

use std::collections::BTreeMap;

use moewe::families::{self, LayerHere, Resolved};
use moewe::schedule::{Bucket, Decision, Schedule};
use moewe::{Checkpoint, Error, Result};
use serde_json::{Map, Value, json};

use crate::backends::{self, BackendName, Choice};
use crate::engine::{Engine, Memory};
use crate::json::Status;
use crate::report::{self, Page, complain, to_stdout};
use crate::{Exit, InspectOptions, source, spec_text};

/// Prints a layer after the other.
pub fn inspect(options: &InspectOptions) -> Exit {
    let (checkpoint, layers) = match open(options) {
        Ok(found) => found,
        Err(error) => {
            if options.json {
                print(&json!({"layer": null, "status": Status::of(&error).word(), "reason": error.to_string()}));
            }
            complain(&error.to_string());
            return if Status::of(&error) == Status::Unsupported { Exit::Unsupported } else { Exit::Failed };
        }
    };
    let names = [BackendName::Reference, BackendName::Cpu, BackendName::Wgpu, BackendName::Cuda];
    let choose = |name| {
        let adapter = options.device.adapter.as_deref().filter(|_| name == BackendName::Wgpu);
        backends::choose(name, adapter, options.device.constraints())
    };
    let backends: Vec<Choice> = names.into_iter().map(choose).collect();
    let (mut exit, mut warned) = (Exit::Passed, false);
    let mut text = Text::default();
    for here in &layers {
        let found = Found::of(&checkpoint, here, options, &backends);
        if let (Some(resolved), false) = (&found.resolved, warned) {
            report::warn_of_unknown_keys(&resolved.unknown_keys);
            warned = true;
        }
        exit = worse(exit, found.exit());
        match options.json {
            true => print(&found.json(&checkpoint, options.explain)),
            false => text.add(&checkpoint, &found, options.explain),
        }
    }
    if !options.json {
        to_stdout(&text.finish(&checkpoint));
    }
    exit
}

fn print(object: &Value) {
    to_stdout(&format!("{object}\n"));
}

fn open(options: &InspectOptions) -> Result<(Checkpoint, Vec<LayerHere>)> {
    let checkpoint = Checkpoint::open(&options.checkpoint)?;
    let layers = families::layers(&checkpoint)?;
    Ok((checkpoint, layers))
}

/// A part that cannot be read is worse than one that nothing computes.
fn worse(a: Exit, b: Exit) -> Exit {
    match (a, b) {
        (Exit::Failed, _) | (_, Exit::Failed) => Exit::Failed,
        (Exit::Unsupported, _) | (_, Exit::Unsupported) => Exit::Unsupported,
        (Exit::Usage, _) | (_, Exit::Usage) => Exit::Usage,
        (Exit::Passed, Exit::Passed) => Exit::Passed,
    }
}

/// A layer, as far as it could be read.
struct Found<'a> {
    here: &'a LayerHere,
    resolved: Option<Resolved>,
    /// Why it was not resolved.
    error: Option<Error>,
    backends: Vec<Answer>,
}

/// What a backend makes of a layer.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    backend: &'static str,
    adapter: Option<String>,
    /// Why it does not compute it.
    refusal: Option<String>,
    memory: Option<Memory>,
    decisions: Vec<Decision>,
    /// Most tokens of a call, and (step, kernel) in order.
    steps: Vec<(usize, Vec<(String, &'static str)>)>,
}

/// The kernels of each bucket.
fn steps(schedule: &Schedule) -> Vec<(usize, Vec<(String, &'static str)>)> {
    let one = |bucket: &Bucket| {
        let steps = bucket.steps.iter().map(|step| (step.name.clone(), step.operation.source().kernel()));
        (bucket.max_tokens, steps.collect())
    };
    schedule.buckets.iter().map(one).collect()
}

impl<'a> Found<'a> {
    fn of(checkpoint: &Checkpoint, here: &'a LayerHere, options: &InspectOptions, backends: &[Choice]) -> Self {
        let mut found = Self { here, resolved: None, error: None, backends: vec![] };
        if here.tensors.is_empty() {
            return found;
        }
        match resolve(checkpoint, here.layer, options) {
            Err(error) => found.error = Some(error),
            Ok(resolved) => {
                let answer = |choice: &Choice| {
                    let planned = match &choice.engine {
                        Ok(engine) => schedule(engine.as_ref(), &resolved, options.tokens),
                        Err(error) => Err(error.to_string()),
                    };
                    let (refusal, schedule) = match planned {
                        Ok(schedule) => (None, schedule),
                        Err(refusal) => (Some(refusal), None),
                    };
                    Answer {
                        backend: choice.backend,
                        adapter: choice.adapter.clone(),
                        refusal,
                        memory: schedule.as_ref().map(Memory::of),
                        steps: schedule.as_ref().map(steps).unwrap_or_default(),
                        decisions: schedule.map(|schedule| schedule.decisions).unwrap_or_default(),
                    }
                };
                found.backends = backends.iter().map(answer).collect();
                found.resolved = Some(resolved);
            }
        }
        found
    }

    fn status(&self) -> &'static str {
        match (&self.error, &self.resolved) {
            (Some(error), _) => Status::of(error).word(),
            (None, Some(_)) if self.backends.iter().all(|answer| answer.refusal.is_some()) => {
                Status::Unsupported.word()
            }
            (None, Some(_)) => Status::Pass.word(),
            (None, None) if self.here.dense => "dense",
            (None, None) => "not here",
        }
    }

    fn exit(&self) -> Exit {
        match self.status() {
            "fail" => Exit::Failed,
            "unsupported" => Exit::Unsupported,
            _ => Exit::Passed,
        }
    }

    /// Why it is not `pass`.
    fn reason(&self) -> Option<String> {
        let refused = || self.backends.first().and_then(|answer| answer.refusal.clone());
        self.error.as_ref().map(ToString::to_string).or_else(|| refused().filter(|_| self.status() == "unsupported"))
    }

    fn json(&self, checkpoint: &Checkpoint, explain: bool) -> Value {
        let spec = |resolved: &Resolved| -> Map<String, Value> {
            spec_text::fields(&resolved.spec).into_iter().map(|(path, value)| (path, value.into())).collect()
        };
        let tensor = |name: &String| {
            let tensor = checkpoint.tensor(name)?;
            let (dtype, bytes) = (format!("{:?}", tensor.dtype), tensor.bytes.len());
            let blocks = blocks(checkpoint, name);
            Some(json!({"name": name, "dtype": dtype, "blocks": blocks, "shape": tensor.shape, "bytes": bytes}))
        };
        let tensors: Vec<Value> = self.here.tensors.iter().filter_map(tensor).collect();
        let bytes: u64 = tensors.iter().filter_map(|tensor| tensor.get("bytes")?.as_u64()).sum();
        let answer = |answer: &Answer| {
            let Answer { backend, adapter, refusal, memory, decisions, steps } = answer;
            let mut object = Map::new();
            object.insert("backend".into(), (*backend).into());
            object.insert("adapter".into(), json!(adapter));
            object.insert("status".into(), if refusal.is_some() { "unsupported" } else { "pass" }.into());
            object.insert("reason".into(), json!(refusal));
            object.insert("memory".into(), json!(memory.map(report::memory_json)));
            if explain {
                object.insert("decisions".into(), report::decisions_json(decisions).into());
                let kernel = |(step, kernel): &(String, &str)| json!({"step": step, "kernel": kernel});
                let bucket = |(tokens, steps): &(usize, Vec<(String, &'static str)>)| json!({"max_tokens": tokens, "steps": steps.iter().map(kernel).collect::<Vec<_>>()});
                object.insert("kernels".into(), steps.iter().map(bucket).collect());
            }
            Value::Object(object)
        };
        let resolved = self.resolved.as_ref();
        json!({
            "layer": self.here.layer,
            "status": self.status(),
            "reason": self.reason(),
            "family": resolved.map(|resolved| resolved.family),
            "model_type": resolved.map(|resolved| &resolved.model_type),
            "spec": resolved.map(spec),
            "unknown_keys": resolved.map_or(&[][..], |resolved| &resolved.unknown_keys),
            "notes": resolved.map_or(&[][..], |resolved| &resolved.notes),
            "bytes": bytes,
            "tensors": tensors,
            "backends": self.backends.iter().map(answer).collect::<Vec<_>>(),
        })
    }
}

fn resolve(checkpoint: &Checkpoint, layer: usize, options: &InspectOptions) -> Result<Resolved> {
    let request = source::request(checkpoint, Some(layer), &options.activations)?;
    families::resolve(checkpoint, &request)
}

fn schedule(engine: &dyn Engine, resolved: &Resolved, tokens: usize) -> Result<Option<Schedule>, String> {
    engine.schedule(&resolved.spec, tokens).map_err(|error| error.to_string())
}

/// The page for people: layers that are the same but for their number stand together.
#[derive(Default)]
struct Text {
    head: Option<String>,
    /// (layers, what is said of them).
    groups: Vec<(Vec<usize>, String)>,
}

impl Text {
    fn add(&mut self, checkpoint: &Checkpoint, found: &Found<'_>, explain: bool) {
        let mut page = Page::default();
        page.line("status", found.status());
        if let Some(reason) = found.reason() {
            page.line("reason", &reason);
        }
        if let Some(resolved) = &found.resolved {
            self.head.get_or_insert_with(|| format!("{} (model_type {})", resolved.family, resolved.model_type));
            resolved.notes.iter().for_each(|note| page.line("note", note));
            if !resolved.unknown_keys.is_empty() {
                page.line("unknown keys", &resolved.unknown_keys.join(", "));
            }
            page.spec(&spec_text::fields(&resolved.spec));
        }
        let patterns = patterns(checkpoint, found.here);
        if !patterns.is_empty() {
            let bytes: usize = patterns.iter().map(|pattern| pattern.1.1).sum();
            page.title(&format!("tensors ({bytes} bytes)"));
        }
        for ((name, dtype, shape), (count, _)) in patterns {
            page.entry(
                &name,
                &format!("{dtype} {shape:?}{}", if count > 1 { format!(" x {count}") } else { String::new() }),
            );
        }
        for Answer { backend, adapter, refusal, memory, decisions, steps } in &found.backends {
            let adapter = adapter.as_ref().map(|adapter| format!(" on {adapter}")).unwrap_or_default();
            page.title(&format!("{backend}{adapter}"));
            match (refusal, memory) {
                (Some(refusal), _) => page.entry("no", refusal),
                (None, None) => page.entry("yes", "it reads the checkpoint where it is"),
                (None, Some(memory)) => {
                    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
                    let Memory { weights, scratch, io } = *memory;
                    let parts = format!(
                        "{:.3} MiB: weights {:.3}, scratch {:.3}, input and output {:.3}",
                        mib(weights + scratch + io),
                        mib(weights),
                        mib(scratch),
                        mib(io)
                    );
                    page.entry("yes", &parts);
                }
            }
            for Decision { step, choice, because } in decisions.iter().filter(|_| explain) {
                page.entry(step, &format!("{choice}: {because}"));
            }
            for (tokens, steps) in steps.iter().filter(|_| explain) {
                page.title(&format!("{backend}: kernels of a call of up to {tokens} tokens"));
                steps.iter().for_each(|(step, kernel)| page.entry(step, kernel));
            }
        }
        match self.groups.iter_mut().find(|(_, known)| *known == page.0) {
            Some((layers, _)) => layers.push(found.here.layer),
            None => self.groups.push((vec![found.here.layer], page.0)),
        }
    }

    fn finish(self, checkpoint: &Checkpoint) -> String {
        let mut page = Page::default();
        page.line("checkpoint", &checkpoint.searched());
        if let Some(head) = &self.head {
            page.line("family", head);
        }
        for (layers, text) in self.groups {
            page.0.push_str(&format!("\n== layers {}\n", ranges(&layers)));
            page.0.push_str(&text);
        }
        page.0
    }
}

/// `3-5, 9`.
fn ranges(layers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = vec![];
    for &layer in layers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => runs.push((layer, layer)),
        }
    }
    let run = |&(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}

/// What the bytes of a tensor of GGUF hold, if they are blocks.
fn blocks(checkpoint: &Checkpoint, name: &str) -> Option<String> {
    match checkpoint.gguf_format(name) {
        Ok(format) => format.map(|format| format!("{format:?}")),
        Err(Error::Unsupported(refusal)) => Some(refusal.value),
        Err(_) => None,
    }
}

type Pattern = (String, String, Vec<usize>);

/// Tensors that differ in a number of their names only: how many, and their bytes.
fn patterns(checkpoint: &Checkpoint, here: &LayerHere) -> BTreeMap<Pattern, (usize, usize)> {
    let mut patterns: BTreeMap<Pattern, (usize, usize)> = BTreeMap::new();
    for name in &here.tensors {
        let Some(tensor) = checkpoint.tensor(name) else { continue };
        let numbered =
            |part: &str| if part.bytes().all(|byte| byte.is_ascii_digit()) { "*".into() } else { part.to_owned() };
        let name = name.split('.').map(numbered).collect::<Vec<String>>().join(".");
        let stored = blocks(checkpoint, &tensor.name).unwrap_or_else(|| format!("{:?}", tensor.dtype));
        let one = patterns.entry((name, stored, tensor.shape.clone())).or_default();
        one.0 += 1;
        one.1 += tensor.bytes.len();
    }
    patterns
}
