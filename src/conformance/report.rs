//! What the trials came to, as Markdown: for a user's report, and for the project's own document.

use std::fmt::Write as _;

use super::vocabulary::vocabulary;
use super::witnesses::{Witness, witnesses};
use super::{Mutant, Outcome, Status};

/// A backend's column.
#[derive(Debug, Clone, Copy)]
pub struct Column<'a> {
    /// Its title.
    pub title: &'a str,
    /// What it came to; without any, `instead` stands in every row.
    pub outcomes: &'a [Outcome],
    /// What stands there else.
    pub instead: &'a str,
}

/// How the table is to be read.
pub const LEGEND: &str = "\
A row is a place of the spec that holds a number, a flag, a choice or something optional. Its witness is a pair of
specs that differ there. `killed (n)`: the backend matches the reference on the witness, and no longer does if the
field is dropped: when the schedule is lowered without it (`lower`), or when one of the n things that it acts through
(steps, tables, the reading of a matrix) has lost it, each alone (`carrier`). `refused`: the backend, or the rules of
the spec, refuse the field by its name. `SURVIVED`: nothing noticed that it is dropped. `NO WITNESS`: nobody has
written one.
";

/// How many fields came to what.
pub fn summary(outcomes: &[Outcome]) -> String {
    let with = |wanted: &dyn Fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| wanted(outcome)).count();
    let lower = |status: Status| with(&|outcome| outcome.mutant == Mutant::Lower && outcome.status == status);
    let open = with(&|outcome| !outcome.status.holds());
    format!(
        "{} fields: {} killed, {} refused; {open} of {} mutants survived or lack a witness",
        lower(Status::Killed) + lower(Status::Refused) + lower(Status::Survived) + lower(Status::NoWitness),
        lower(Status::Killed),
        lower(Status::Refused),
        outcomes.len()
    )
}

/// A row for each field, a column for each backend.
pub fn table(columns: &[Column<'_>]) -> String {
    let witnesses = witnesses();
    let titles: Vec<&str> = columns.iter().map(|column| column.title).collect();
    let mut text = format!("| field | witness | {} |\n|---|---|{}\n", titles.join(" | "), "---|".repeat(titles.len()));
    for field in vocabulary().fields {
        let witness = witnesses.iter().find(|witness| witness.field == field).map_or_else(String::new, Witness::name);
        let cells: Vec<String> = columns.iter().map(|column| cell(&field, column)).collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "| `{field}` | {witness} | {} |", cells.join(" | "));
    }
    text
}

fn cell(field: &str, column: &Column<'_>) -> String {
    let of = |mutant: Mutant| column.outcomes.iter().find(|outcome| outcome.field == field && outcome.mutant == mutant);
    let (Some(lower), Some(carrier)) = (of(Mutant::Lower), of(Mutant::Carrier)) else {
        return column.instead.into();
    };
    let words = |outcome: &Outcome| match outcome.status {
        Status::Killed => match outcome.mutant {
            Mutant::Lower => "killed".to_owned(),
            Mutant::Carrier => format!("killed ({})", outcome.carriers),
        },
        Status::Refused => format!("refused: {}", outcome.because),
        Status::Survived => format!("SURVIVED: {}", outcome.reason),
        Status::NoWitness => "NO WITNESS".into(),
    };
    match lower.status == carrier.status {
        true => words(carrier),
        false => format!("lower {}, carrier {}", words(lower), words(carrier)),
    }
}

/// A user's report on one backend: what it ran on, and the table.
pub fn report(about: &[(&str, String)], column: &Column<'_>) -> String {
    let mut text = format!("# Conformance of {}\n\n{}\n", column.title, LEGEND);
    for (what, value) in about {
        let _ = writeln!(text, "- {what}: {value}");
    }
    let _ = write!(text, "\n{}.\n\n{}", summary(column.outcomes), table(std::slice::from_ref(column)));
    text
}
