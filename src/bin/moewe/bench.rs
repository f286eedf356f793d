//! `moewe bench`: layers of real models with synthetic weights, checked and then timed.

mod cases;
mod device;
mod plot;

use std::collections::HashMap;
use std::fmt::Write as _;

use moewe::conformance::synthetic;
use moewe::schedule::tuning;
use moewe::spec::BlockScale;
use moewe::{Error, MoeSpec, Options, Result};
use rayon::prelude::*;
use serde_json::{Value, json};

pub use cases::{NAMES, experts_of_a_token, layer};
pub use device::{Bench, Layer, OnDevice};

use crate::backends::{self, Choice, Constraints};
use crate::json::{Status, number};
use crate::metrics;
use crate::progress::Bar;
use crate::report::{complain, to_stdout, warn};
use crate::{BenchOptions, Exit, svg, tune};
use cases::{expert_bytes, flops, stated_flops};
use device::{Measured, Place, Row};

/// Of a sampled row, relative to its norm. Both sides round the output to bf16, so they differ by half a step (2^-9)
/// in the few values where f32 sums in another order fall on the other side of its middle: far less than 2^-9 in all.
const TOLERANCE: f64 = 1e-3;
/// Where activations are quantised, a code beside the middle of two may go either way, a step of 2^-3 of one value in
/// thousands; all of quantisation moves a row by 2e-2, so a layer that leaves it out does not pass.
const QUANTISED_TOLERANCE: f64 = 5e-3;
/// Where FP8 units sum the products of a block ([`BlockScale::Promoted`]), the last of their 13 bits moves a few values
/// in a hundred to the code beside: half of what quantisation itself moves.
const PROMOTED_TOLERANCE: f64 = 1e-2;

/// Times the cases and prints a line for each.
pub fn bench(options: &BenchOptions) -> Exit {
    let constraints = Constraints { checked: options.checked, keep_pipelines: true, ..Constraints::NONE };
    let choice = backends::choose(options.backend, options.adapter.as_deref(), constraints);
    warn(&choice.warnings);
    let cases = options.case.iter().filter_map(|name| Some((name, layer(name, options.scale)?)));
    let cases: Vec<(&String, MoeSpec)> = cases.collect();
    let lines = cases.iter().map(|(_, spec)| variants(spec).len() * options.tokens.len()).sum::<usize>();
    let mut session = Session {
        options,
        choice: &choice,
        read_rate: None,
        points: vec![],
        tally: Tally::default(),
        bar: Bar::new(),
        lines: [0, lines as u64],
    };
    if !options.json {
        to_stdout(&heading(&choice, options.scale));
    }
    for (name, spec) in &cases {
        session.case(name, spec);
    }
    session.bar.clear();
    let drawn = options.plot.as_ref().map(|path| {
        let title =
            format!("moewe bench on {}, scale {}", choice.adapter.as_deref().unwrap_or(choice.backend), options.scale);
        let cases: Vec<&str> = options.case.iter().map(String::as_str).collect();
        svg::save(path, &plot::svg(&title, &cases, &session.points))
    });
    match drawn {
        Some(false) => Exit::Failed,
        Some(true) | None => session.tally.exit(),
    }
}

/// How many lines came to what.
#[derive(Default)]
struct Tally {
    failed: usize,
    unsupported: usize,
}

impl Tally {
    fn exit(&self) -> Exit {
        match (self.failed, self.unsupported) {
            (0, 0) => Exit::Passed,
            (0, _) => Exit::Unsupported,
            (_, _) => Exit::Failed,
        }
    }
}

struct Session<'a> {
    options: &'a BenchOptions,
    choice: &'a Choice,
    /// Bytes a second, once measured.
    read_rate: Option<f64>,
    /// Of the chart.
    points: Vec<plot::Point>,
    tally: Tally,
    bar: Bar,
    /// Printed, and all.
    lines: [u64; 2],
}

/// Whether activation and quantisation are one step: without quantised activations there is no choice.
fn variants(spec: &MoeSpec) -> &'static [bool] {
    if spec.experts.activation_quant.is_on() { &[true, false] } else { &[true] }
}

/// One line of the report.
struct Line<'a> {
    case: &'a str,
    tokens: usize,
    /// Whether activation and quantisation are one step, where there is a choice.
    fused: bool,
    reason: Option<String>,
    status: Status,
    /// What a layer reads and computes, and the time that this takes at best.
    work: Option<Work>,
    dispatches: Option<usize>,
    checked_rows: usize,
    worst_error: Option<f64>,
    tolerance: f64,
    /// Ascending; of lines that pass.
    seconds: Vec<f64>,
}

#[derive(Clone, Copy)]
struct Work {
    bytes: f64,
    flops: u64,
    read_rate: f64,
    floor: f64,
}

impl Session<'_> {
    fn case(&mut self, name: &str, spec: &MoeSpec) {
        let mut expected = Places::new();
        let most = self.options.tokens.iter().copied().max().unwrap_or(1);
        for &fused in variants(spec) {
            let blank = |tokens: usize| Line {
                case: name,
                tokens,
                fused,
                reason: None,
                status: Status::Pass,
                work: None,
                dispatches: None,
                checked_rows: 0,
                worst_error: None,
                tolerance: tolerance(spec),
                seconds: vec![],
            };
            self.at(&format!("{name}: weights of {} experts", spec.num_experts));
            let failed = |error: &Error| (Status::of(error), error.to_string());
            let bench = match &self.choice.engine {
                Ok(engine) => engine.bench().map_err(|error| failed(&error)),
                Err(error) => Err(failed(error)),
            };
            let ready = bench.as_ref().map_err(Clone::clone).and_then(|bench| {
                let rate = self.read_rate.map_or_else(|| bench.read_rate(), Ok).map_err(|error| failed(&error))?;
                self.read_rate = Some(rate);
                let options = self.planned(spec, fused).map_err(|error| failed(&error))?;
                Ok((rate, bench.layer(spec, most, &options).map_err(|error| failed(&error))?))
            });
            for &tokens in &self.options.tokens {
                self.at(&format!("{name}: {tokens} tokens"));
                let mut line = blank(tokens);
                let measured = match &ready {
                    Ok((rate, layer)) => self
                        .measure(spec, layer.as_ref(), *rate, &mut line, &mut expected)
                        .map_err(|error| failed(&error)),
                    Err(refusal) => Err(refusal.clone()),
                };
                if let Err((status, reason)) = measured {
                    (line.status, line.reason) = (status, Some(reason));
                }
                self.print(&line);
            }
        }
    }

    /// How a layer is planned: as a file of tuned choices says, if it knows the case here.
    fn planned(&self, spec: &MoeSpec, fused: bool) -> Result<Options> {
        let tuned = self.options.tuning.as_deref().map(|path| tune::cuts(path, self.choice, spec)).transpose()?;
        if let (Some(None), true) = (&tuned, fused) {
            warn(&[format!(
                "tuning: nothing of this case on this adapter, planned as without it ({})",
                tuning::problem(spec)
            )]);
        }
        let cuts = tuned.flatten().unwrap_or(Options::AUTO.cuts);
        Ok(Options { fuse_quantization: fused, cuts, ..Options::AUTO })
    }

    fn at(&self, what: &str) {
        let [done, all] = self.lines;
        self.bar.at(what, done, all);
    }

    /// Fills the line.
    fn measure(
        &self,
        spec: &MoeSpec,
        layer: &dyn Layer,
        read_rate: f64,
        line: &mut Line<'_>,
        expected: &mut Places,
    ) -> Result<()> {
        let tokens = line.tokens;
        let Checked { measured, rows, error, complaint } = checked(spec, layer, tokens, expected)?;
        (line.checked_rows, line.worst_error, line.reason) = (rows, Some(error), complaint);
        let Measured { distinct, seconds, dispatches } = measured;
        let distinct = distinct.iter().sum::<usize>() as f64 / distinct.len().max(1) as f64;
        let (bytes, flops) = ((distinct * expert_bytes(spec) as f64).round(), flops(spec, tokens));
        let stated = stated_flops(self.choice.adapter.as_deref(), &spec.experts.activation_quant);
        let floor = (bytes / read_rate).max(stated.map_or(0.0, |rate| flops as f64 / rate));
        line.work = Some(Work { bytes, flops, read_rate, floor });
        line.dispatches = Some(dispatches);
        line.seconds = seconds;
        line.status = if line.reason.is_some() { Status::Fail } else { Status::Pass };
        Ok(())
    }

    fn print(&mut self, line: &Line<'_>) {
        self.bar.clear();
        self.lines[0] += 1;
        match line.status {
            Status::Pass => self.points.extend(line.gap().map(|gap| plot::Point {
                case: line.case.to_owned(),
                tokens: line.tokens,
                fused: line.fused,
                gap,
            })),
            Status::Fail => self.tally.failed += 1,
            Status::Unsupported => self.tally.unsupported += 1,
        }
        if self.options.json {
            to_stdout(&format!("{}\n", line.json(self.choice, self.options.scale)));
        } else {
            to_stdout(&line.text());
        }
        if let Some(reason) = &line.reason {
            complain(&format!("{}, {} tokens: {reason}", line.case, line.tokens));
        }
    }
}

/// Rows as they should be.
pub type Places = HashMap<Place, Row>;

/// What calls of one size came to.
pub struct Checked {
    /// Times, ascending; none if rows are wrong.
    measured: Measured,
    /// How many were compared.
    rows: usize,
    /// Of the worst.
    error: f64,
    /// What is wrong.
    pub complaint: Option<String>,
}

impl Checked {
    /// Of the times, in seconds.
    pub fn median(&self) -> Option<f64> {
        let seconds = &self.measured.seconds;
        seconds.get(seconds.len() / 2).copied()
    }
}

/// Compares sampled rows with the reference, and times calls of so many tokens if they are right.
pub fn checked(spec: &MoeSpec, layer: &dyn Layer, tokens: usize, expected: &mut Places) -> Result<Checked> {
    // Enough that the experts of all inputs do not fit a cache together; large inputs choose nearly all of them.
    let inputs = match tokens {
        0..=16 => 8,
        17..=64 => 4,
        65..=256 => 2,
        _ => 1,
    };
    let sampled = [(0, 0), (1.min(inputs - 1), tokens - 1)];
    let unknown: Vec<Place> = sampled.into_iter().filter(|place| !expected.contains_key(place)).collect();
    let rows: Vec<Row> = unknown.into_par_iter().map(|place| reference(spec, place)).collect::<Result<_>>()?;
    expected.extend(rows.into_iter().map(|row| (row.place, row)));
    let (mut compared, mut verdict) = (0, Verdict { error: 0.0, complaint: None });
    let mut measured = layer.measure(tokens, inputs, &sampled, &mut |rows| {
        compared = rows.len();
        verdict = judge(rows, expected, spec.hidden_size, tolerance(spec));
        verdict.complaint.is_none()
    })?;
    measured.seconds.sort_by(f64::total_cmp);
    Ok(Checked { measured, rows: compared, error: verdict.error, complaint: verdict.complaint })
}

/// The row as it should be.
fn reference(spec: &MoeSpec, place: Place) -> Result<Row> {
    let layer = synthetic::reference_row(spec, place.0, place.1)?;
    Ok(Row { place, topk_ids: layer.routed.topk_ids, output: layer.output })
}

struct Verdict {
    /// Of the worst row.
    error: f64,
    complaint: Option<String>,
}

/// What a sampled row of a case may be off by.
fn tolerance(spec: &MoeSpec) -> f64 {
    let quantised = match spec.precision.block_scale {
        BlockScale::Promoted => PROMOTED_TOLERANCE,
        BlockScale::Exact | BlockScale::Folded => QUANTISED_TOLERANCE,
    };
    if spec.experts.activation_quant.is_on() { quantised } else { TOLERANCE }
}

fn judge(found: &[Row], expected: &HashMap<Place, Row>, width: usize, tolerance: f64) -> Verdict {
    let mut verdict = Verdict { error: 0.0, complaint: None };
    for row in found {
        let Some(wanted) = expected.get(&row.place) else { continue };
        let error = metrics::row_relative(&row.output, &wanted.output, width);
        let (input, token) = row.place;
        let sorted = |ids: &[i32]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        let complaint = if sorted(&row.topk_ids) != sorted(&wanted.topk_ids) {
            Some(format!("experts {:?}, expected {:?}", row.topk_ids, wanted.topk_ids))
        } else if error <= tolerance {
            None
        } else {
            Some(format!("relative error {error:.3e}, expected at most {tolerance:.3e}"))
        };
        verdict.error = metrics::largest([verdict.error, error].into_iter());
        let of_row = complaint.map(|complaint| format!("token {token} of input {input}: {complaint}; not timed"));
        verdict.complaint = verdict.complaint.or(of_row);
    }
    verdict
}

fn heading(choice: &Choice, scale: f64) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "backend      {}", choice.backend);
    let _ = writeln!(text, "adapter      {}", choice.adapter.as_deref().unwrap_or("none"));
    let _ = writeln!(text, "scale        {scale} of the experts\n");
    let _ = writeln!(
        text,
        "{:<17} {:>6} {:<8} {:<11} {:>11} {:>11} {:>7} {:>6} {:>10} {:>9}",
        "case", "tokens", "fused", "status", "median us", "floor us", "gap", "runs", "dispatches", "error"
    );
    text
}

impl Line<'_> {
    /// (median, least, most).
    fn times(&self) -> Option<[f64; 3]> {
        let seconds = &self.seconds;
        match self.status {
            Status::Pass => Some([*seconds.get(seconds.len() / 2)?, *seconds.first()?, *seconds.last()?]),
            Status::Fail | Status::Unsupported => None,
        }
    }

    fn gap(&self) -> Option<f64> {
        self.work.zip(self.times()).map(|(work, times)| times[0] / work.floor)
    }

    fn json(&self, choice: &Choice, scale: f64) -> Value {
        let micros = |at: usize| self.times().map(|times| number(1e6 * times[at]));
        let work = self.work;
        let timed = work.zip(self.times());
        json!({
            "case": self.case,
            "backend": choice.backend,
            "adapter": choice.adapter,
            "tokens": self.tokens,
            "scale": scale,
            "fused": self.fused,
            "status": self.status.word(),
            "reason": self.reason,
            "us_median": micros(0),
            "us_min": micros(1),
            "us_max": micros(2),
            "runs": timed.map(|_| self.seconds.len()),
            "bytes": work.map(|work| number(work.bytes)),
            "flops": work.map(|work| work.flops),
            "read_gb_s": timed.map(|(work, _)| number(1e-9 * work.read_rate)),
            "floor_us": timed.map(|(work, _)| number(1e6 * work.floor)),
            "gap": self.gap().map(number),
            "dispatches": self.dispatches,
            "checked_rows": self.checked_rows,
            "worst_error": self.worst_error.map(number),
            "tolerance": number(self.tolerance),
        })
    }

    fn text(&self) -> String {
        let timed = self.work.zip(self.times());
        let shown = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        format!(
            "{:<17} {:>6} {:<8} {:<11} {:>11} {:>11} {:>7} {:>6} {:>10} {:>9}\n",
            self.case,
            self.tokens,
            self.fused,
            self.status.word(),
            shown(timed.map(|(_, times)| format!("{:.1}", 1e6 * times[0]))),
            shown(timed.map(|(work, _)| format!("{:.1}", 1e6 * work.floor))),
            shown(self.gap().map(|gap| format!("{gap:.2}"))),
            shown(timed.map(|_| self.seconds.len().to_string())),
            shown(self.dispatches.map(|dispatches| dispatches.to_string())),
            shown(self.worst_error.map(|error| format!("{error:.1e}"))),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(output: &[f32], topk_ids: &[i32]) -> Row {
        Row { place: (0, 0), topk_ids: topk_ids.to_vec(), output: output.to_vec() }
    }

    #[test]
    fn a_row_with_other_values_or_other_experts_is_wrong() {
        let expected = HashMap::from([((0, 0), row(&[1.0, 2.0], &[3, 1]))]);
        let complaint = |found: Row| judge(&[found], &expected, 2, TOLERANCE).complaint;
        assert_eq!(complaint(row(&[1.0, 2.0], &[1, 3])), None);
        assert!(complaint(row(&[1.0, 2.1], &[1, 3])).is_some_and(|text| text.contains("relative error")));
        assert!(complaint(row(&[f32::NAN, 2.0], &[1, 3])).is_some_and(|text| text.contains("NaN")));
        assert!(complaint(row(&[1.0, 2.0], &[1, 2])).is_some_and(|text| text.contains("experts [1, 2]")));
    }
}
