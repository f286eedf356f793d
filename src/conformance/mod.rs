//! Proof that a backend drops no field of the spec.
//!
//! For each field of the [`vocabulary`](vocabulary::vocabulary) there is a witness: two specs that differ in it, and
//! rows for which that shows. The backend has to match the reference on the witness, or refuse it by the field's
//! name. Then the field is dropped on purpose, in every way that a lowering or a kernel could drop it, and each
//! time the same comparison has to fail. A comparison that no dropped field fails would be no proof.
//!
//! Two mutants of each witness:
//!
//! - `lower`: the schedule is lowered from the spec without the field; weights, rows, buffers and judge belong to
//!   the spec with it.
//! - `carrier`: the schedule is the right one, but for one thing that the field acts through: a step, a table of
//!   the plan's, or the way a matrix is read. Each of them in turn, for few tokens, for some and for many.
//!
//! [`ablation`] drops fields of a layer as a user has it, and leaves it to the reference what that does.
//!
//! For the tool, the tests and the benches; no other part of the library uses it.

pub mod ablation;
pub mod answers;
pub mod lockstep;
mod matrix;
mod mutants;
pub mod report;
pub mod sample;
pub mod synthetic;
mod trial;
pub mod vocabulary;
pub mod witnesses;

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::host::Host;

/// A way to drop a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutant {
    /// Lowered as if the field were not there.
    Lower,
    /// One carrier of the field has lost it.
    Carrier,
}

impl Mutant {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Lower => "lower",
            Self::Carrier => "carrier",
        }
    }
}

/// What became of a mutant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The comparison failed, as it should.
    Killed,
    /// Nothing noticed that the field is dropped.
    Survived,
    /// The backend refuses the field by its name.
    Refused,
    /// Nobody has written one for the field.
    NoWitness,
}

impl Status {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::Survived => "survived",
            Self::Refused => "refused",
            Self::NoWitness => "no_witness",
        }
    }

    /// Whether the field is proved to act, or to be refused.
    pub fn holds(self) -> bool {
        match self {
            Self::Killed | Self::Refused => true,
            Self::Survived | Self::NoWitness => false,
        }
    }
}

/// A mutant of a field on a backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Path of the field.
    pub field: String,
    /// How it was dropped.
    pub mutant: Mutant,
    /// Where.
    pub backend: &'static str,
    /// What became of that.
    pub status: Status,
    /// What changes in the witness; empty without one.
    pub witness: String,
    /// What noticed it, or did not.
    pub reason: String,
    /// Why it is refused, in short; else empty.
    pub because: String,
    /// Things that the field acts through, with [`Mutant::Carrier`].
    pub carriers: usize,
}

/// Whether every dotted word of `words` is one of the path's, in order.
fn within(words: &str, path: &str) -> bool {
    let mut path = path.split('.');
    words.split('.').all(|word| path.any(|other| other == word))
}

/// Both mutants of one witness on a backend.
pub fn try_witness<B: Host + Clone>(backend: &B, witness: &witnesses::Witness) -> [Outcome; 2] {
    trial::try_witness(backend, witness)
}

/// Tries every field on a backend, in the order of the vocabulary, each mutant in turn. `progress` hears how many
/// fields of how many are done.
pub fn run<B: Host + Clone + Sync>(backend: &B, progress: &(dyn Fn(usize, usize) + Sync)) -> Vec<Outcome> {
    let (fields, witnesses) = (vocabulary::vocabulary().fields, witnesses::witnesses());
    let outcomes = spread(fields.len(), progress, &|at| {
        let field = &fields[at];
        match witnesses.iter().find(|witness| witness.field == *field) {
            Some(witness) => trial::try_witness(backend, witness).into(),
            None => [Mutant::Lower, Mutant::Carrier]
                .map(|mutant| Outcome {
                    field: field.clone(),
                    mutant,
                    backend: backend.facts().backend,
                    status: Status::NoWitness,
                    witness: String::new(),
                    reason: "no witness is written for it".into(),
                    because: String::new(),
                    carriers: 0,
                })
                .to_vec(),
        }
    });
    outcomes.into_iter().flat_map(|outcomes: Vec<_>| outcomes).collect()
}

/// `work` of 0 to `count`, on threads of our own: the twins and the reference use rayon's, which would take up whole
/// pieces in between. `progress` hears how many of how many are done.
fn spread<T: Send>(
    count: usize,
    progress: &(dyn Fn(usize, usize) + Sync),
    work: &(dyn Fn(usize) -> T + Sync),
) -> Vec<T> {
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let results: Vec<Mutex<Option<T>>> = (0..count).map(|_| Mutex::default()).collect();
    let run = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(result) = results.get(at) else { return };
            let value = work(at);
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, count);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
    results.into_iter().filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}
