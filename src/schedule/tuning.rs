//! Tuning as data: what was measured of a problem on a device, as a small file from which a caller takes [`Cuts`].
//!
//! A file has a JSON object a line, each of one problem on one adapter. `moewe tune` writes it; nothing in the library
//! reads one unless the caller does.

use serde_json::{Value, json};

use super::{Cut, Cuts};
use crate::error::{Error, Result};
use crate::spec::MoeSpec;

/// What a line of the file says it is.
const FORMAT: &str = "moewe tuning 1";

/// Problems on adapters, each with the cuts that were fastest there.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tuning {
    entries: Vec<Tuned>,
}

/// One problem on one adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// Name of the backend.
    pub backend: String,
    /// Name of the adapter; empty for a backend without adapters.
    pub adapter: String,
    /// What [`problem`] says.
    pub problem: String,
    /// For each of [`Cut::ALL`] but the last, up to how many sixteenths of a row of a matrix in the mean it is chosen.
    pub sixteenths: [u32; 5],
}

/// What decides how fast a cut is: sizes, formats and quantisation of the routed experts.
pub fn problem(spec: &MoeSpec) -> String {
    let mlp = &spec.experts;
    format!(
        "hidden {}, intermediate {}, matrices {}, rows a token {}, weights {:?}, activations {:?}",
        spec.hidden_size,
        mlp.intermediate_size,
        spec.num_slots(),
        spec.rows_per_token(),
        mlp.format,
        mlp.activation_quant,
    )
}

impl Tuning {
    /// Reads a file's text.
    ///
    /// # Errors
    /// A line that is no entry, with its number.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let entries = lines.map(|(at, line)| Tuned::parse(line).map_err(|found| refused(at + 1, found)));
        Ok(Self { entries: entries.collect::<Result<_>>()? })
    }

    /// The file's text.
    pub fn text(&self) -> String {
        self.entries.iter().map(|entry| format!("{}\n", entry.json())).collect()
    }

    /// Adds an entry, in the place of one of the same problem on the same adapter.
    pub fn insert(&mut self, tuned: Tuned) {
        let same = |known: &Tuned| {
            known.backend == tuned.backend && known.adapter == tuned.adapter && known.problem == tuned.problem
        };
        self.entries.retain(|known| !same(known));
        self.entries.push(tuned);
    }

    /// How calls of this spec are cut on an adapter (empty for a backend without adapters); `None` if nobody measured it.
    pub fn cuts(&self, backend: &str, adapter: &str, spec: &MoeSpec) -> Option<Cuts> {
        let problem = problem(spec);
        let found = |known: &&Tuned| known.backend == backend && known.adapter == adapter && known.problem == problem;
        self.entries.iter().find(found).map(|tuned| Cuts::UpToMeanRows(tuned.sixteenths))
    }
}

fn refused(line: usize, found: String) -> Error {
    let expected = format!("an object of the format {FORMAT:?}");
    Error::invalid("tuning", format!("line {line}: {found}"), expected, "measure again with `moewe tune`")
}

impl Tuned {
    /// Its line of a file.
    pub fn json(&self) -> Value {
        let Self { backend, adapter, problem, sixteenths } = self;
        // What is chosen without bound has none.
        let rows = |sixteenths: u32| (sixteenths < u32::MAX).then(|| f64::from(sixteenths) / 16.0);
        let up_to: serde_json::Map<String, Value> =
            Cut::ALL.iter().zip(sixteenths).map(|(cut, &most)| (cut.name().into(), json!(rows(most)))).collect();
        json!({
            "format": FORMAT,
            "backend": backend,
            "adapter": adapter,
            "problem": problem,
            "up_to_mean_rows": up_to,
        })
    }

    fn parse(line: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
        let text = |key: &str| {
            let found = value.get(key).and_then(Value::as_str).map(str::to_owned);
            found.ok_or_else(|| format!("no text under {key:?}"))
        };
        let format = text("format")?;
        if format != FORMAT {
            return Err(format!("the format {format:?}"));
        }
        let up_to = value.get("up_to_mean_rows").ok_or("no \"up_to_mean_rows\"")?;
        let bound = |name: &str| match up_to.get(name) {
            Some(Value::Null) => Ok(u32::MAX),
            Some(rows) => match rows.as_f64() {
                // Below 2^27 rows sixteenths are exact.
                Some(rows) if (0.0..134_217_728.0).contains(&rows) => Ok((rows * 16.0).round() as u32),
                Some(_) | None => Err(format!("{rows} rows under {name:?}")),
            },
            None => Err(format!("no {name:?}")),
        };
        let mut sixteenths = [0; 5];
        for (most, cut) in sixteenths.iter_mut().zip(Cut::ALL) {
            *most = bound(cut.name())?;
        }
        Ok(Self { backend: text("backend")?, adapter: text("adapter")?, problem: text("problem")?, sixteenths })
    }
}

/// What calls of one size took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timed {
    /// Rows of a matrix in the mean.
    pub mean_rows: f64,
    /// Seconds by cut, in the order of [`Cut::ALL`]; `None` where it was not measured.
    pub seconds: [Option<f64>; Cut::ALL.len()],
}

/// For each cut but the last, up to how many sixteenths of a row in the mean to choose it: so that all calls, ascending in
/// size, take the least time in sum, each relative to its best. A cut of more rows is never followed by one of fewer.
/// Between two sizes that want different cuts the bound is their geometric mean.
pub fn bounds(calls: &[Timed]) -> [u32; 5] {
    const CUTS: usize = Cut::ALL.len();
    /// What a cut that was not measured costs: more than any that was.
    const NEVER: f64 = 1e6;
    let costs = calls.iter().map(|call| {
        let best = call.seconds.iter().flatten().copied().fold(f64::INFINITY, f64::min);
        call.seconds.map(|seconds| seconds.map_or(NEVER, |seconds| seconds / best))
    });
    // The least cost up to here if this call has this cut, and the cut of the call before then.
    let mut least = [0.0; CUTS];
    let mut before: Vec<[usize; CUTS]> = vec![];
    for cost in costs {
        let mut from = [0; CUTS];
        let mut next = [0.0; CUTS];
        let mut best = 0;
        for cut in 0..CUTS {
            best = if least[cut] < least[best] { cut } else { best };
            from[cut] = best;
            next[cut] = least[best] + cost[cut];
        }
        before.push(from);
        least = next;
    }
    let mut cut = (0..CUTS).fold(0, |best, cut| if least[cut] < least[best] { cut } else { best });
    let mut chosen = vec![0; calls.len()];
    for (at, from) in before.iter().enumerate().rev() {
        chosen[at] = cut;
        cut = from[cut];
    }
    let mut bounds = [0; 5];
    for (cut, bound) in bounds.iter_mut().enumerate() {
        let last = chosen.iter().rposition(|&chosen| chosen <= cut);
        *bound = match last {
            None => 0,
            Some(last) => match calls.get(last + 1) {
                None => u32::MAX,
                Some(next) => ((calls[last].mean_rows * next.mean_rows).sqrt() * 16.0).round() as u32,
            },
        };
    }
    bounds
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(mean_rows: f64, seconds: [f64; 6]) -> Timed {
        Timed { mean_rows, seconds: seconds.map(|seconds| Some(seconds).filter(|seconds| *seconds > 0.0)) }
    }

    #[test]
    fn bounds_lie_between_the_sizes_that_want_different_cuts() {
        let calls = [
            call(0.0625, [1.0, 2.0, 2.0, 2.0, 3.0, 3.0]),
            call(1.0, [3.0, 2.0, 2.5, 3.0, 4.0, 4.0]),
            call(4.0, [9.0, 4.0, 3.0, 3.5, 5.0, 5.0]),
            call(64.0, [0.0, 0.0, 9.0, 8.0, 5.0, 6.0]),
            call(256.0, [0.0, 0.0, 0.0, 30.0, 20.0, 15.0]),
        ];
        let between = |a: f64, b: f64| ((a * b).sqrt() * 16.0).round() as u32;
        // No call wants eight rows: what wants four goes on to tiles.
        let quads = between(4.0, 64.0);
        assert_eq!(bounds(&calls), [between(0.0625, 1.0), between(1.0, 4.0), quads, quads, between(64.0, 256.0)]);
    }

    #[test]
    fn one_slow_call_between_two_does_not_turn_the_order() {
        // The second call alone would have a cut of fewer rows than the first.
        let calls = [
            call(1.0, [9.0, 1.0, 3.0, 3.0, 3.0, 3.0]),
            call(2.0, [0.9, 1.0, 3.0, 3.0, 3.0, 3.0]),
            call(4.0, [9.0, 9.0, 9.0, 9.0, 1.0, 9.0]),
        ];
        assert_eq!(bounds(&calls), [0, 45, 45, 45, u32::MAX]);
    }

    #[test]
    fn one_cut_for_all_sizes_has_no_bound() {
        assert_eq!(bounds(&[call(1.0, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0])]), [u32::MAX; 5]);
        assert_eq!(bounds(&[call(1.0, [2.0, 2.0, 2.0, 2.0, 2.0, 1.0])]), [0; 5]);
        assert_eq!(bounds(&[]), [0; 5]);
    }

    #[test]
    fn a_file_comes_back_as_it_was_and_a_new_entry_takes_the_place_of_the_old() {
        let tuned = |problem: &str, sixteenths| Tuned {
            backend: "cuda".into(),
            adapter: "card \"9\"".into(),
            problem: problem.into(),
            sixteenths,
        };
        let mut tuning = Tuning::default();
        tuning.insert(tuned("a", [0, 8, 100, 640, u32::MAX]));
        tuning.insert(tuned("b", [1, 2, 3, 4, 5]));
        tuning.insert(tuned("a", [0, 9, 100, 640, u32::MAX]));
        assert_eq!(tuning.entries.len(), 2);
        assert_eq!(Tuning::parse(&tuning.text()).unwrap(), tuning);
        assert_eq!(Tuning::parse("\n").unwrap(), Tuning::default());
    }

    #[test]
    fn what_is_no_entry_is_refused_with_its_line() {
        let good = Tuned { backend: "x".into(), adapter: String::new(), problem: "p".into(), sixteenths: [0; 5] };
        let good = good.json().to_string();
        for (line, said) in [
            ("{".into(), "EOF"),
            ("[]".into(), "no text under \"format\""),
            (good.replace("tuning 1", "tuning 2"), "the format \"moewe tuning 2\""),
            (good.replace("\"problem\"", "\"question\""), "no text under \"problem\""),
            (good.replace("\"octets\":0.0", "\"octets\":-1.0"), "-1.0 rows under \"octets\""),
            (good.replace("\"octets\":0.0", "\"octets\":1e300"), "1e+300 rows under \"octets\""),
            (good.replace("\"octets\":0.0,", ""), "no \"octets\""),
        ] {
            let text = Tuning::parse(&format!("{good}\n{line}")).unwrap_err().to_string();
            assert!(text.contains("line 2") && text.contains(said) && text.contains("moewe tune"), "{text}");
        }
    }
}
