//! Streaming: what comes out does not depend on how the input is divided.

use ampoule_models::tokenizer::{StopMatcher, StreamDecoder};
use proptest::prelude::*;

/// Bytes that are often almost UTF-8: whole characters, their beginnings, and noise.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        any::<char>().prop_map(|c| c.to_string().into_bytes()),
        (any::<char>(), 0..4_usize).prop_map(|(c, n)| c.to_string().bytes().take(n).collect()),
        proptest::collection::vec(any::<u8>(), 0..4),
        proptest::sample::select(vec![0xe0, 0xed, 0xf0, 0xf4, 0x80, 0x9f, 0xa0, 0xbf, 0xc0, 0xff])
            .prop_map(|b| vec![b]),
    ];
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

/// Divides `len` items at places that the cuts choose.
fn parts(len: usize, cuts: &[usize]) -> Vec<std::ops::Range<usize>> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut % (len + 1)).collect();
    at.extend([0, len]);
    at.sort_unstable();
    at.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// The definition of [`StopMatcher`], read off its documentation.
fn stopped(text: &str, stops: &[String]) -> (String, Option<usize>) {
    for end in 1..=text.len() {
        let before = &text.as_bytes()[..end];
        let ending = |stop: &&String| !stop.is_empty() && before.ends_with(stop.as_bytes());
        if let Some(longest) = stops.iter().filter(ending).map(String::len).max() {
            let index = stops
                .iter()
                .position(|stop| stop.len() == longest && before.ends_with(stop.as_bytes()));
            return (text[..end - longest].to_owned(), index);
        }
    }
    (text.to_owned(), None)
}

/// Whether the end of the text could be the beginning of a stop string that is longer than it.
fn could_begin(end: &str, stops: &[String]) -> bool {
    stops.iter().any(|stop| stop.len() > end.len() && stop.starts_with(end))
}

/// Divides the text and compares with the definition.
fn check_stops(text: &str, stops: &[String], cuts: &[usize]) -> Result<(), TestCaseError> {
    let (expected, index) = stopped(text, stops);
    let mut matcher = StopMatcher::new(stops);
    let mut out = String::new();
    let chars: Vec<char> = text.chars().collect();
    for part in parts(chars.len(), cuts) {
        let piece: String = chars[part].iter().collect();
        let passed = matcher.push(&piece);
        out.push_str(&passed.text);
        // What passed is final, and no more is held back than the rule says.
        prop_assert!(expected.starts_with(&out), "{out} is not a beginning of {expected}");
        if passed.stopped.is_none() && !matcher.held().is_empty() {
            prop_assert!(could_begin(matcher.held(), stops));
        }
    }
    let found = matcher.stopped();
    if found.is_none() {
        out.push_str(&matcher.finish());
    }
    prop_assert_eq!(out, expected);
    prop_assert_eq!(found.map(|i| &stops[i]), index.map(|i| &stops[i]));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn decoded_text_equals_the_lossy_text_of_all_bytes(bytes in bytes(), cuts in proptest::collection::vec(any::<usize>(), 0..12)) {
        let mut decoder = StreamDecoder::new();
        let mut text = String::new();
        for part in parts(bytes.len(), &cuts) {
            text.push_str(&decoder.push(&bytes[part]));
            prop_assert!(decoder.pending().len() <= 3);
        }
        text.push_str(&decoder.finish());
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        prop_assert_eq!(decoder, StreamDecoder::new());
    }

    #[test]
    fn whole_characters_are_never_held_back(text in any::<String>(), cuts in proptest::collection::vec(any::<usize>(), 0..12)) {
        let mut decoder = StreamDecoder::new();
        let mut seen = 0;
        let mut out = String::new();
        for part in parts(text.len(), &cuts) {
            seen = seen.max(part.end);
            out.push_str(&decoder.push(&text.as_bytes()[part]));
            let whole = (0..=seen).rev().find(|&at| text.is_char_boundary(at)).unwrap();
            prop_assert_eq!(&out, &text[..whole]);
        }
    }

    #[test]
    fn stop_strings_are_found_wherever_the_text_is_divided(
        text in "[abé]{0,40}",
        stops in proptest::collection::vec("[abé]{0,6}", 0..4),
        cuts in proptest::collection::vec(any::<usize>(), 0..12),
    ) {
        check_stops(&text, &stops, &cuts)?;
    }

    #[test]
    fn stop_strings_that_repeat_themselves_are_found(
        text in "(aab|aaab|a|b){0,20}",
        stops in proptest::collection::vec("(aab|a|b){3,6}", 1..3),
        cuts in proptest::collection::vec(any::<usize>(), 0..4),
    ) {
        check_stops(&text, &stops, &cuts)?;
    }
}

#[test]
fn a_character_across_tokens_comes_out_once_whole() {
    let mut decoder = StreamDecoder::new();
    let face = "😀".as_bytes();
    assert_eq!(decoder.push(&face[..1]), "");
    assert_eq!(decoder.push(&face[1..3]), "");
    assert_eq!(decoder.pending(), &face[..3]);
    assert_eq!(decoder.push(&face[3..]), "😀");
    assert_eq!(decoder.push(&face[..2]), "");
    assert_eq!(decoder.push(b"a"), "\u{fffd}a");
    assert_eq!(decoder.push(&face[..3]), "");
    assert_eq!(decoder.finish(), "\u{fffd}");
    assert_eq!(decoder.finish(), "");
}

#[test]
fn a_stop_string_across_tokens_is_found_and_cut_off() {
    let mut matcher = StopMatcher::new(["\nUser:", "###"]);
    assert_eq!(matcher.push("Fine.\nUs").text, "Fine.");
    assert_eq!(matcher.held(), "\nUs");
    assert_eq!(matcher.push("ual").text, "\nUsual");
    assert_eq!(matcher.push(" ##\nUser").text, " ##");
    let last = matcher.push(": hello");
    assert_eq!((last.text.as_str(), last.stopped), ("", Some(0)));
    assert_eq!(matcher.push("more").text, "");
    assert_eq!(matcher.finish(), "");
    assert_eq!(matcher.push("again").text, "again", "finish makes the matcher new");
}

#[test]
fn a_stop_string_that_begins_within_a_failed_one_is_found() {
    let mut matcher = StopMatcher::new(["aabaaac"]);
    let passed = matcher.push("aabaaabaaac");
    assert_eq!((passed.text.as_str(), passed.stopped), ("aaba", Some(0)));
}

#[test]
fn without_stop_strings_everything_passes() {
    for stops in [vec![], vec![""]] {
        let mut matcher = StopMatcher::new(stops);
        assert_eq!(matcher.push("abc").text, "abc");
        assert_eq!(matcher.finish(), "");
    }
}
