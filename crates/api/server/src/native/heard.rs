//! Which tokens of a reply a listener heard, by the text that was played or shown.

use unicode_normalization_alignments::UnicodeNormalization;

use crate::error::{ApiError, ApiResult};
use crate::prompt::ModelInfo;

/// Characters of a text in an error.
const EXCERPT: usize = 24;

/// A letter that is compared, and the bytes of the text that it is of.
#[derive(Clone, Copy)]
struct Letter {
    char: char,
    start: usize,
    end: usize,
}

/// The letters of a text, made as they are asked for: accents apart from what they stand on, white space as one space, none at
/// the beginning.
fn letters(text: &str) -> impl Iterator<Item = Letter> {
    let mut at = text.len() - text.trim_start().len();
    let units = std::iter::from_fn(move || {
        let (start, rest) = (at, text.get(at..)?);
        let first = rest.chars().next()?;
        let white = first.is_whitespace();
        at += if white { rest.len() - rest.trim_start().len() } else { first.len_utf8() };
        Some((if white { ' ' } else { first }, start, at))
    });
    units.flat_map(|(letter, start, end)| {
        let parts = std::iter::once(letter).nfd();
        parts.map(move |(char, _)| Letter { char, start, end })
    })
}

/// How many bytes of a reply were heard. The text is read no further than it agrees with the reply.
fn bytes_heard(reply: &str, text: &str) -> Result<usize, String> {
    if reply.starts_with(text) {
        return Ok(text.len());
    }
    let (mut said, mut heard) = (letters(reply).peekable(), letters(text).peekable());
    let mut last = None;
    while let Some(letter) = heard.peek() {
        match said.next_if(|said| said.char == letter.char) {
            Some(same) => last = Some((same, *letter)),
            // White space at the end of the text alone.
            None if letter.char == ' ' && letter.end == text.len() => break,
            None => return Err(difference(reply, text, said.peek(), letter)),
        }
        heard.next();
    }
    let Some((end, letter)) = last else { return Ok(0) };
    match said.peek() {
        // An accent that the text lacks.
        Some(next) if next.start == end.start => Err(difference(reply, text, Some(&end), &letter)),
        _ => Ok(end.end),
    }
}

fn difference(reply: &str, text: &str, said: Option<&Letter>, heard: &Letter) -> String {
    let excerpt = |text: &str, at: usize| {
        let rest = text.get(at..).unwrap_or_default();
        let short: String = rest.chars().take(EXCERPT).collect();
        let more = if short.len() < rest.len() { "..." } else { "" };
        format!("{short:?}{more}")
    };
    let at = heard.start;
    let count = text.get(..at).unwrap_or_default().chars().count();
    let has = said.map_or_else(
        || "ends there".to_owned(),
        |letter| format!("goes on with {}", excerpt(reply, letter.start)),
    );
    format!(
        "'heard_text' is not how the last reply begins: after {count} characters it goes on with {}, and the reply {has}. \
         How much white space there is does not matter, all else does; 'heard_tokens', the number of tokens that were played, needs no text",
        excerpt(text, at)
    )
}

/// How many tokens of a reply lie within a text that was heard.
pub(super) fn heard(info: &ModelInfo, tokens: &[u32], text: &str) -> ApiResult<usize> {
    // The token that ended the reply is no word of it.
    let tokens = match tokens {
        [words @ .., last] if info.tokenizer.is_eos(*last) => words,
        all => all,
    };
    let reply = info.tokenizer.decode(tokens);
    let bytes = bytes_heard(&reply, text).map_err(|words| ApiError::param("heard_text", words))?;
    let fits = |n: &usize| info.tokenizer.decode(&tokens[..*n]).len() <= bytes;
    let (mut low, mut high) = (0, tokens.len() + 1);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if fits(&middle) { low = middle } else { high = middle }
    }
    // A character in pieces may be longer than the whole: one of the next counts of tokens can fit again.
    Ok((low..=(low + 8).min(tokens.len())).rev().find(fits).unwrap_or(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_and_the_way_accents_are_written_do_not_matter() {
        let reply = " Once  upon\na caf\u{e9}, there";
        for (text, heard) in [
            ("", ""),
            ("  ", ""),
            (" Once", " Once"),
            ("Once", " Once"),
            ("Once upon", " Once  upon"),
            ("Once upon ", " Once  upon\n"),
            ("\n Once upon a", " Once  upon\na"),
            ("Once upon a cafe\u{301}", " Once  upon\na caf\u{e9}"),
            ("Once upon a caf\u{e9}, there", reply),
            ("Once upon a caf\u{e9}, there  ", reply),
            ("Once upon a caf\u{e9},\u{2003}\n ", " Once  upon\na caf\u{e9}, "),
        ] {
            assert_eq!(bytes_heard(reply, text).map(|n| &reply[..n]), Ok(heard), "{text:?}");
        }
    }

    #[test]
    fn an_error_says_where_the_texts_part() {
        let reply = " Once upon a caf\u{e9}, there lived a fox and a hen.";
        let said = |text: &str| bytes_heard(reply, text).unwrap_err();
        let words = said("Once upon the cafe");
        assert!(words.contains("after 10 characters it goes on with \"the cafe\""), "{words}");
        assert!(words.contains("goes on with \"a caf\u{e9}, there lived a fo\"..."), "{words}");
        assert!(words.contains("heard_tokens"), "{words}");
        let words = said("Once upon a cafe");
        assert!(words.contains("after 15 characters it goes on with \"e\""), "{words}");
        let words = bytes_heard("One", "One two").unwrap_err();
        assert!(
            words.contains("after 3 characters it goes on with \" two\", and the reply ends there"),
            "{words}"
        );
        // A text that is much longer than the reply is read up to where they part.
        let long = format!("One{}", " two".repeat(1 << 20));
        let words = bytes_heard("One twig", &long).unwrap_err();
        assert!(words.contains("after 6 characters it goes on with \"o two two"), "{words}");
        assert!(bytes_heard("One", "one").is_err() && bytes_heard("", "x").is_err());
    }
}
