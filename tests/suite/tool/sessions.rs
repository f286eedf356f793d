//! docs/SESSIONS.md: each command as a user meets it. What stands there is what the tool says, but for numbers, which
//! are those of the machine that wrote them. `MOEWE_BLESS=1` writes the outputs anew.

use super::{Said, moewe};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/SESSIONS.md");
/// Stands for lines that are left out.
const GAP: &str = "...";
/// Of a longer output so many lines at its beginning and at its end are shown.
const SHOWN: [usize; 2] = [70, 56];
/// Commands that take a minute, or whose words are the machine's too: run to write the document only.
const SLOW: [&str; 3] = ["conformance", "doctor", "tune"];

/// A command and what the document has below it.
struct Session {
    args: Vec<String>,
    /// Its lines in the document: the first behind the command's, and the one that ends the block.
    lines: [usize; 2],
}

fn sessions(document: &[&str]) -> Vec<Session> {
    let mut found = vec![];
    for (at, line) in document.iter().enumerate() {
        let Some(command) = line.strip_prefix("$ moewe ") else { continue };
        assert_eq!(document[at - 1], "```text", "a block for each command");
        let end = (at..document.len()).find(|at| document[*at] == "```").unwrap();
        found.push(Session { args: command.split(' ').map(str::to_owned).collect(), lines: [at + 1, end] });
    }
    found
}

/// A line without its numbers, bars and widths: those are another machine's.
fn masked(line: &str) -> String {
    let line: String = line.chars().filter(|c| !('\u{2580}'..='\u{259f}').contains(c)).collect();
    let mut text = String::new();
    let mut rest = line.as_str();
    while let Some(first) = rest.chars().next() {
        if first.is_ascii_digit() {
            let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
            rest = &rest[end..];
            if let Some(power) = rest.strip_prefix("e-").filter(|power| power.starts_with(|c: char| c.is_ascii_digit()))
            {
                rest = power.trim_start_matches(|c: char| c.is_ascii_digit());
            }
            text.push('#');
        } else {
            text.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    // The adapter's name is the machine's too.
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.split_once("wgpu on ").map_or(text.clone(), |(before, _)| format!("{before}wgpu on"))
}

/// Whether `shown`, in which [`GAP`] stands for any lines, is `said`.
fn same(shown: &[&str], said: &[&str]) -> Result<(), String> {
    let mut parts = shown.split(|line| *line == GAP);
    let head = parts.next().unwrap_or(&[]);
    let tail = parts.next();
    assert!(parts.next().is_none(), "one gap a session");
    let differ = |shown: &[&str], said: &[&str]| {
        let mut pairs = shown.iter().zip(said);
        pairs.find(|(a, b)| masked(a) != masked(b)).map(|(a, b)| format!("shown: {a}\nsaid:  {b}"))
    };
    let tail_lines = tail.unwrap_or(&[]);
    let enough = match tail {
        None => head.len() == said.len(),
        Some(tail) => said.len() >= head.len() + tail.len(),
    };
    if !enough {
        return Err(format!("{} lines are shown, {} said", shown.len(), said.len()));
    }
    let last = &said[said.len() - tail_lines.len()..];
    differ(head, said).or_else(|| differ(tail_lines, last)).map_or(Ok(()), Err)
}

fn run(args: &[String]) -> Said {
    // Paths are those of the repository's root, where tests run.
    moewe(args)
}

#[test]
fn every_command_has_a_session_and_it_is_what_the_tool_says() {
    let bless = std::env::var_os("MOEWE_BLESS").is_some();
    let text = std::fs::read_to_string(DOCUMENT).unwrap();
    let document: Vec<&str> = text.lines().collect();
    let mut written: Vec<String> = vec![];
    let mut next = 0;
    for Session { args, lines: [begin, end] } in sessions(&document) {
        if SLOW.contains(&args[0].as_str()) && !bless {
            continue;
        }
        let said = run(&args);
        assert_eq!(said.code, 0, "{args:?}: {}", said.stderr);
        let lines: Vec<&str> = said.stdout.lines().collect();
        if bless {
            written.extend(document[next..begin].iter().map(|line| (*line).to_owned()));
            let [first, last] = SHOWN;
            match lines.len() > first + last + 1 {
                true => {
                    written.extend(lines[..first].iter().map(|line| (*line).to_owned()));
                    written.push(GAP.into());
                    written.extend(lines[lines.len() - last..].iter().map(|line| (*line).to_owned()));
                }
                false => written.extend(lines.iter().map(|line| (*line).to_owned())),
            }
            next = end;
        } else if let Err(difference) = same(&document[begin..end], &lines) {
            panic!("{args:?}: MOEWE_BLESS=1 writes it anew\n{difference}");
        }
    }
    if bless {
        written.extend(document[next..].iter().map(|line| (*line).to_owned()));
        std::fs::write(DOCUMENT, written.join("\n") + "\n").unwrap();
    }
    // A command may have a document of its own.
    let documents = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/docs")).unwrap();
    let text = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let all: String = documents.map(|file| text(file.unwrap().path())).collect();
    for name in super::commands::listed() {
        assert!(all.contains(&format!("\n$ moewe {name}")), "{name} has no session");
    }
}

#[test]
fn a_difference_in_words_is_seen_and_one_in_numbers_is_not() {
    assert_eq!(masked("  total    0.4873 ms  35.2 %"), masked("total 12 ms 5 %"));
    assert_eq!(masked("topk 1.192e-7 of 1.000e-5  ok"), masked("topk 0 of 1e-5 ok"));
    assert_eq!(masked("   0   3 █████▋"), masked("0 11 ██"));
    assert_ne!(masked("status       pass"), masked("status       fail"));
    assert!(same(&["a 1", GAP, "z 2"], &["a 7", "b", "c", "z 9"]).is_ok());
    assert!(same(&["a", GAP, "z"], &["a", "b"]).is_err() && same(&["a"], &["a", "b"]).is_err());
}
