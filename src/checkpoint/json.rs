//! JSON as Python writes it, without its silent losses.

use std::collections::HashSet;

use serde_json::Value;

/// Why a text is refused.
#[derive(Debug)]
pub(super) enum Fault {
    /// Not JSON.
    Syntax(serde_json::Error),
    /// An object holds this key twice; a parser would drop the first value.
    Duplicate(String),
}

/// Parses JSON. `NaN`, `Infinity` and numbers beyond f64, all of which Python's parser takes, become
/// `{"__float__": "NaN"}` and the like, the spelling that transformers uses for them.
pub(super) fn parse(text: &str) -> Result<Value, Fault> {
    serde_json::from_slice(&rewrite(text.as_bytes())?).map_err(Fault::Syntax)
}

fn rewrite(text: &[u8]) -> Result<Vec<u8>, Fault> {
    let mut out = Vec::with_capacity(text.len());
    // The keys seen so far, one entry a nesting level; `None` in an array.
    let mut levels: Vec<Option<HashSet<String>>> = Vec::new();
    let mut rest = text;
    while let Some(&first) = rest.first() {
        let length = match first {
            b'"' => string_length(rest),
            first if in_word(first) => rest.iter().take_while(|&&byte| in_word(byte)).count(),
            _ => 1,
        };
        let (token, after) = rest.split_at_checked(length).unwrap_or((rest, &[]));
        match first {
            b'{' => levels.push(Some(HashSet::new())),
            b'[' => levels.push(None),
            b'}' | b']' => drop(levels.pop()),
            b'"' if after.trim_ascii_start().first() == Some(&b':') => {
                if let (Some(Some(keys)), Ok(key)) = (levels.last_mut(), serde_json::from_slice::<String>(token))
                    && !keys.insert(key.clone())
                {
                    return Err(Fault::Duplicate(key));
                }
            }
            _ => {}
        }
        match special(token) {
            None => out.extend_from_slice(token),
            Some(name) => out.extend_from_slice(format!("{{\"__float__\": \"{name}\"}}").as_bytes()),
        }
        rest = after;
    }
    Ok(out)
}

/// Length of the string at the start of `text`, quotes included; all of it if it is not closed.
fn string_length(text: &[u8]) -> usize {
    let mut escaped = false;
    for (index, &byte) in text.iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return index + 1,
            _ => {}
        }
    }
    text.len()
}

fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.')
}

/// The name of a number that JSON cannot hold.
fn special(token: &[u8]) -> Option<&'static str> {
    match token {
        b"NaN" => return Some("NaN"),
        b"Infinity" => return Some("Infinity"),
        b"-Infinity" => return Some("-Infinity"),
        _ => {}
    }
    // Rust's parser also takes words such as `inf`: only tokens with a digit are numbers here.
    let number = token.iter().any(u8::is_ascii_digit).then(|| std::str::from_utf8(token).ok()?.parse::<f64>().ok());
    match number.flatten() {
        Some(value) if value == f64::INFINITY => Some("Infinity"),
        Some(value) if value == f64::NEG_INFINITY => Some("-Infinity"),
        Some(_) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_json_keep_their_meaning() {
        let text = r#"{"a": NaN, "b": [-Infinity, 1e999], "c": "NaN, \" Infinity", "d": -1e999, "e": 1e30, "é": 1}"#;
        let expected = r#"{"a": {"__float__": "NaN"}, "b": [{"__float__": "-Infinity"}, {"__float__": "Infinity"}],
            "c": "NaN, \" Infinity", "d": {"__float__": "-Infinity"}, "e": 1e30, "é": 1}"#;
        assert_eq!(parse(text).unwrap(), serde_json::from_str::<Value>(expected).unwrap());
    }

    #[test]
    fn a_key_given_twice_is_refused_on_its_own_level_only() {
        assert!(parse(r#"{"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}, "a"]}"#).is_ok());
        assert!(matches!(parse(r#"{"a": 1, "b": {}, "\u0061" : 2}"#), Err(Fault::Duplicate(key)) if key == "a"));
    }

    #[test]
    fn malformed_text_is_an_error() {
        for text in ["", "{", "[", "\"", "{\"a\":", "{\"a\\", "}}", "nan", "{\"a\": infinity}", "1.2.3"] {
            assert!(matches!(parse(text), Err(Fault::Syntax(_))), "{text}");
        }
        assert!(matches!(parse(&"[".repeat(100_000)), Err(Fault::Syntax(_))));
    }
}
