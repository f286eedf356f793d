//! What `moewe run` prints: text, or one JSON object with the same content.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};

use moewe::families::Resolved;
use moewe::schedule::Decision;
use moewe::weights::Damage;
use serde_json::{Map, Value, json};

use crate::backends::PassedOver;
use crate::chart;
use crate::check::{Comparison, Measure};
use crate::engine::{Memory, Timing};
use crate::json::{Status, number};
use crate::spec_text;

/// One run, as far as it came.
pub struct Report {
    /// What it came to.
    pub status: Status,
    /// Why it did not pass.
    pub reason: Option<String>,
    /// Name of the backend.
    pub backend: &'static str,
    /// Name and driver of the adapter.
    pub adapter: Option<String>,
    /// The other adapters.
    pub passed_over: Vec<PassedOver>,
    /// Where the layer comes from.
    pub checkpoint: String,
    /// How many tokens.
    pub tokens: usize,
    /// Of the tokens.
    pub seed: u64,
    /// The layer, once resolved.
    pub layer: Option<Layer>,
    /// Matrices with weights that are no finite numbers, if they were looked for.
    pub damage: Option<Vec<Damage>>,
    /// What was measured, once it ran.
    pub measured: Option<Measured>,
}

/// A resolved layer.
pub struct Layer {
    /// The family that read the config.
    pub family: &'static str,
    /// `model_type`.
    pub model_type: String,
    /// Its number.
    pub layer: Option<usize>,
    /// Keys of the config that nobody knows.
    pub unknown_keys: Vec<String>,
    /// What to know beside.
    pub notes: Vec<String>,
    /// (path, value) of each field.
    pub spec: Vec<(String, String)>,
}

impl Layer {
    /// Of what a family found.
    pub fn of(resolved: &Resolved) -> Self {
        Self {
            family: resolved.family,
            model_type: resolved.model_type.clone(),
            layer: resolved.layer,
            unknown_keys: resolved.unknown_keys.clone(),
            notes: resolved.notes.clone(),
            spec: spec_text::fields(&resolved.spec),
        }
    }
}

/// What a run showed.
pub struct Measured {
    /// Bytes on the device.
    pub memory: Option<Memory>,
    /// What was chosen among ways that mean the same, and why.
    pub decisions: Vec<Decision>,
    /// Time per step.
    pub timing: Option<Timing>,
    /// Errors; `None` for the reference itself.
    pub comparison: Option<Comparison>,
    /// How often each expert was chosen.
    pub tokens_per_expert: Vec<u64>,
}

/// Prints warnings on standard error.
pub fn warn(warnings: &[String]) {
    for warning in warnings {
        to_stderr(&format!("warning: {warning}"));
    }
}

/// Warns of keys that nobody knows.
pub fn warn_of_unknown_keys(keys: &[String]) {
    for key in keys {
        to_stderr(&format!("warning: config.json: key {key} is unknown; what it says is not in the spec"));
    }
}

/// Prints an error on standard error.
pub fn complain(error: &str) {
    to_stderr(&format!("error: {error}"));
}

/// Says on a terminal what takes its time; a file or a pipe wants no such lines.
pub fn progress(what: &str) {
    if std::io::stderr().is_terminal() {
        to_stderr(&format!("... {what}"));
    }
}

/// Says on a terminal how many of how many are done, on one line.
pub fn count(done: usize, all: usize, of_what: &str) {
    if std::io::stderr().is_terminal() {
        let _ = write!(std::io::stderr().lock(), "\r{done} of {all} {of_what}");
    }
}

/// Clears that line.
pub fn count_ended() {
    if std::io::stderr().is_terminal() {
        let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
    }
}

fn to_stderr(line: &str) {
    // With standard error closed there is nowhere left to say so.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Prints on standard output; whoever closed it wants no more.
pub fn to_stdout(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn total(timing: &Timing) -> f64 {
    timing.stages.iter().map(|(_, seconds)| seconds).sum()
}

impl Report {
    /// Prints it; errors on standard error, too.
    pub fn print(&self, as_json: bool) {
        to_stdout(&if as_json { format!("{}\n", self.json()) } else { self.text() });
        if let Some(reason) = &self.reason {
            complain(reason);
        }
    }

    fn tokens_per_second(&self, timing: &Timing) -> Option<f64> {
        Some(self.tokens as f64 / total(timing)).filter(|rate| rate.is_finite())
    }

    fn json(&self) -> Value {
        let Self { status, reason, backend, adapter, passed_over, checkpoint, tokens, seed, layer, damage, measured } =
            self;
        let layer = layer.as_ref();
        let timing = measured.as_ref().and_then(|measured| measured.timing.as_ref());
        let memory = measured.as_ref().and_then(|measured| measured.memory);
        let comparison = measured.as_ref().and_then(|measured| measured.comparison.as_ref());
        let spec = |layer: &Layer| -> Map<String, Value> {
            layer.spec.iter().map(|(path, value)| (path.clone(), value.as_str().into())).collect()
        };
        json!({
            "status": status.word(),
            "reason": reason,
            "backend": backend,
            "adapter": adapter,
            "passed_over": passed_over.iter()
                .map(|PassedOver { adapter, reason }| json!({"adapter": adapter, "reason": reason}))
                .collect::<Vec<_>>(),
            "checkpoint": checkpoint,
            "family": layer.map(|layer| layer.family),
            "model_type": layer.map(|layer| &layer.model_type),
            "layer": layer.and_then(|layer| layer.layer),
            "tokens": tokens,
            "checked_tokens": comparison.map(|comparison| comparison.checked_tokens),
            "seed": seed,
            "unknown_keys": layer.map_or(&[][..], |layer| &layer.unknown_keys),
            "notes": layer.map_or(&[][..], |layer| &layer.notes),
            "spec": layer.map(spec),
            "damage": damage.as_ref().map(|damage| damage.iter().map(damage_json).collect::<Vec<_>>()),
            "memory": memory.map(memory_json),
            "decisions": measured.as_ref().map_or(vec![], |measured| decisions_json(&measured.decisions)),
            "stages": timing.map_or(vec![], stages_json),
            "timing_method": timing.map(|timing| &timing.method),
            "tokens_per_s": timing.and_then(|timing| self.tokens_per_second(timing)),
            "errors": comparison.map(errors_json),
            "tokens_per_expert": measured.as_ref().map(|measured| &measured.tokens_per_expert),
        })
    }

    fn text(&self) -> String {
        let mut page = Page::default();
        page.line("backend", self.backend);
        page.line("adapter", self.adapter.as_deref().unwrap_or("none"));
        for PassedOver { adapter, reason } in &self.passed_over {
            page.line("passed over", &format!("{adapter}: {reason}"));
        }
        page.line("checkpoint", &self.checkpoint);
        page.line("tokens", &format!("{}, seed {}", self.tokens, self.seed));
        if let Some(layer) = &self.layer {
            page.layer(layer);
        }
        if let Some(damage) = &self.damage {
            page.damage(damage);
        }
        if let Some(measured) = &self.measured {
            self.measured(&mut page, measured);
        }
        page.0
    }

    fn measured(&self, page: &mut Page, measured: &Measured) {
        if let Some(memory) = measured.memory {
            page.memory(memory);
        }
        if !measured.decisions.is_empty() {
            page.title("decisions");
        }
        for Decision { step, choice, because } in &measured.decisions {
            page.entry(step, &format!("{choice}: {because}"));
        }
        if let Some(timing) = &measured.timing {
            page.stages(timing);
            if let Some(rate) = self.tokens_per_second(timing) {
                page.entry("tokens/s", &format!("{rate:>10.0}"));
            }
        }
        match &measured.comparison {
            Some(comparison) => page.comparison(comparison, self.tokens),
            None => {
                page.title("compared with the reference");
                page.entry("nothing", "this is the reference");
            }
        }
        let counts = &measured.tokens_per_expert;
        let idle = counts.iter().filter(|count| **count == 0).count();
        page.title(&format!("tokens per expert ({} experts, {idle} idle)", counts.len()));
        page.0.push_str(&chart::draw(counts));
    }
}

/// Bytes on a device.
pub fn memory_json(Memory { weights, scratch, io }: Memory) -> Value {
    json!({"weights_bytes": weights, "scratch_bytes": scratch, "io_bytes": io})
}

/// What was chosen, and why.
pub fn decisions_json(decisions: &[Decision]) -> Vec<Value> {
    let one =
        |Decision { step, choice, because }: &Decision| json!({"step": step, "choice": choice, "because": because});
    decisions.iter().map(one).collect()
}

fn damage_json(damage: &Damage) -> Value {
    let Damage { tensor, matrix, count, first } = damage;
    json!({"tensor": tensor, "matrix": matrix, "not_finite": count, "first": first})
}

fn stages_json(timing: &Timing) -> Vec<Value> {
    let total = total(timing);
    let stage = |(name, seconds): &(String, f64)| {
        let share = if total > 0.0 { seconds / total } else { 0.0 };
        json!({"name": name, "seconds": number(*seconds), "share": number(share)})
    };
    timing.stages.iter().map(stage).collect()
}

fn errors_json(comparison: &Comparison) -> Value {
    let Comparison { wrong_tokens, near_ties, checked_tokens: _, measures } = comparison;
    let mut errors = Map::new();
    errors.insert("topk_ids".into(), json!({"wrong_tokens": wrong_tokens, "near_ties": near_ties}));
    for Measure { name, error, tolerance } in measures {
        errors.insert((*name).into(), json!({"error": number(*error), "tolerance": number(*tolerance)}));
    }
    Value::Object(errors)
}

/// Text under construction. Writing to a string does not fail.
#[derive(Default)]
pub struct Page(pub String);

impl Page {
    /// A named value.
    pub fn line(&mut self, name: &str, value: &str) {
        let _ = writeln!(self.0, "{name:<12} {value}");
    }

    /// A heading.
    pub fn title(&mut self, title: &str) {
        let _ = writeln!(self.0, "\n{title}");
    }

    /// A named value below a heading.
    pub fn entry(&mut self, name: &str, value: &str) {
        let _ = writeln!(self.0, "  {name:<38} {value}");
    }

    fn layer(&mut self, layer: &Layer) {
        let Layer { family, model_type, layer: number, unknown_keys, notes, spec } = layer;
        let number = number.map_or_else(|| "the only layer".into(), |number| format!("layer {number}"));
        self.line("family", &format!("{family} (model_type {model_type}), {number}"));
        for note in notes {
            self.line("note", note);
        }
        if !unknown_keys.is_empty() {
            self.line("unknown keys", &unknown_keys.join(", "));
        }
        self.spec(spec);
    }

    /// Each field of a spec.
    pub fn spec(&mut self, spec: &[(String, String)]) {
        self.title("spec");
        for (path, value) in spec {
            self.entry(path, value);
        }
    }

    fn damage(&mut self, damage: &[Damage]) {
        self.title("weights that are NaN or infinite");
        for Damage { tensor, matrix, count, first: [row, col] } in damage {
            self.entry(tensor, &format!("{count}, the first at row {row}, column {col} of {matrix}"));
        }
        if damage.is_empty() {
            self.entry("none", "");
        }
    }

    /// Bytes on a device.
    pub fn memory(&mut self, memory: Memory) {
        let Memory { weights, scratch, io } = memory;
        self.title("memory needed");
        let parts = [("weights", weights), ("scratch", scratch), ("input and output", io)];
        for (name, bytes) in parts.into_iter().chain([("total", weights + scratch + io)]) {
            self.entry(name, &format!("{:>10.3} MiB", bytes as f64 / f64::from(1 << 20)));
        }
    }

    fn stages(&mut self, timing: &Timing) {
        self.title(&format!("time per stage ({})", timing.method));
        let total = total(timing);
        for (name, seconds) in &timing.stages {
            let share = if total > 0.0 { 100.0 * seconds / total } else { 0.0 };
            self.entry(name, &format!("{:>10.4} ms {share:>6.1} %", 1e3 * seconds));
        }
        self.entry("total", &format!("{:>10.4} ms", 1e3 * total));
    }

    fn comparison(&mut self, comparison: &Comparison, tokens: usize) {
        let Comparison { wrong_tokens, near_ties, checked_tokens, measures } = comparison;
        self.title(&format!("compared with the reference (routing of {tokens} tokens, output of {checked_tokens})"));
        let verdict = |holds: bool| if holds { "ok" } else { "WRONG" };
        self.entry(
            "topk_ids",
            &format!("{wrong_tokens} tokens differ, {near_ties} near ties  {}", verdict(*wrong_tokens == 0)),
        );
        for measure in measures {
            let Measure { name, error, tolerance } = measure;
            self.entry(name, &format!("{error:.3e} of {tolerance:.3e}  {}", verdict(measure.holds())));
        }
    }
}
