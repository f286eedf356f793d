//! `moewe conformance`: drops each field of the spec on purpose, and tells whether that is noticed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;

use moewe::conformance::report::{Column, report, summary};
use moewe::conformance::{Mutant, Outcome, Status};
use serde_json::json;

use crate::backends::{self, Choice, Constraints};
use crate::progress::Bar;
use crate::report::{complain, to_stdout, warn};
use crate::{ConformanceOptions, Exit};

/// The version of wgpu that this tool is made with.
const WGPU: &str = "30.0";

/// Tries every field.
pub fn conformance(options: &ConformanceOptions) -> Exit {
    let constraints = Constraints { portable: options.portable, ..Constraints::NONE };
    let choice = backends::choose(options.backend, options.adapter.as_deref(), constraints);
    warn(&choice.warnings);
    let engine = match &choice.engine {
        Ok(engine) => engine,
        Err(error) => {
            complain(&error.to_string());
            return Exit::Usage;
        }
    };
    // A file that cannot be written is found before minutes have gone.
    let mut file = match options.report.as_ref().map(File::create).transpose() {
        Ok(file) => file,
        Err(error) => {
            let path = options.report.clone().unwrap_or_default();
            complain(&format!("{}: cannot be written ({error}); give another path", path.display()));
            return Exit::Usage;
        }
    };
    let bar = Bar::new();
    let tried = engine.conformance(&|done, all| bar.at("dropping fields", done as u64, all as u64));
    drop(bar);
    let outcomes = match tried {
        Ok(Some(outcomes)) => outcomes,
        Ok(None) => {
            complain(&format!("backend {} has no kernels to try: it is what judges them", choice.backend));
            return Exit::Usage;
        }
        Err(error) => {
            complain(&error.to_string());
            return Exit::Failed;
        }
    };
    to_stdout(&if options.json { lines(&outcomes) } else { text(&choice, &outcomes) });
    let held = outcomes.iter().all(|outcome| outcome.status.holds());
    let column = Column { title: choice.backend, outcomes: &outcomes, instead: "" };
    let written = file.as_mut().map_or(Ok(()), |file| file.write_all(report(&about(&choice), &column).as_bytes()));
    match (written, held) {
        (Ok(()), true) => Exit::Passed,
        (Ok(()), false) => Exit::Failed,
        (Err(error), _) => {
            complain(&format!("the report cannot be written: {error}"));
            Exit::Failed
        }
    }
}

/// What it ran on.
fn about(choice: &Choice) -> Vec<(&'static str, String)> {
    let mut about = vec![
        ("backend", choice.backend.to_owned()),
        ("GPU and driver", choice.adapter.clone().unwrap_or_else(|| "none".into())),
        ("machine", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        ("moewe", env!("CARGO_PKG_VERSION").to_owned()),
    ];
    if choice.adapter.is_some() {
        about.push(("wgpu", WGPU.to_owned()));
    }
    about
}

fn lines(outcomes: &[Outcome]) -> String {
    let line = |outcome: &Outcome| {
        let Outcome { field, mutant, backend, status, witness, reason, because: _, carriers: _ } = outcome;
        let line = json!({
            "field": field,
            "mutant": mutant.word(),
            "backend": backend,
            "status": status.word(),
            "witness": witness,
            "reason": reason,
        });
        format!("{line}\n")
    };
    outcomes.iter().map(line).collect()
}

fn text(choice: &Choice, outcomes: &[Outcome]) -> String {
    let device = choice.adapter.as_ref().map_or_else(String::new, |adapter| format!(", {adapter}"));
    let mut text = format!("{}{device}\n\n{:<56} {:<11} {:<11} witness\n", choice.backend, "field", "lower", "carrier");
    for (lower, carrier) in outcomes.iter().zip(outcomes.iter().skip(1)).filter(|(a, _)| a.mutant == Mutant::Lower) {
        let [a, b] = [lower, carrier].map(|outcome| outcome.status.word());
        text += &format!("{:<56} {a:<11} {b:<11} {}\n", lower.field, lower.witness);
    }
    let mut refused: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut open = vec![];
    for Outcome { field, mutant, backend: _, status, witness: _, reason, because, carriers: _ } in outcomes {
        match (status, mutant) {
            (Status::Killed, _) | (Status::Refused, Mutant::Carrier) => {}
            (Status::Refused, Mutant::Lower) => refused.entry(because).or_default().push(field),
            (Status::Survived | Status::NoWitness, _) => open.push(format!("{field} ({}): {reason}\n", mutant.word())),
        }
    }
    for (because, fields) in refused {
        text += &format!("\nrefused, {because}:\n  {}\n", fields.join("\n  "));
    }
    if !open.is_empty() {
        text += &format!("\nsurvived, or without a witness:\n  {}", open.join("  "));
    }
    text + &format!("\n{}\n", summary(outcomes))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_version_of_wgpu_is_that_of_the_manifest() {
        let manifest = include_str!("../../../Cargo.toml");
        assert!(manifest.contains(&format!("\nwgpu = {{ version = \"{}\"", super::WGPU)));
    }
}
