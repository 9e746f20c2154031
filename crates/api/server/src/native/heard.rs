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

/// The letters of a text: accents apart from what they stand on, white space as one space, none at the beginning.
fn letters(text: &str) -> Vec<Letter> {
    let mut out: Vec<Letter> = Vec::with_capacity(text.len());
    for (start, letter) in text.char_indices() {
        let end = start + letter.len_utf8();
        if letter.is_whitespace() {
            match out.last_mut() {
                Some(last) if last.char == ' ' => last.end = end,
                Some(_) => out.push(Letter { char: ' ', start, end }),
                None => {}
            }
        } else {
            let parts = std::iter::once(letter).nfd();
            out.extend(parts.map(|(char, _)| Letter { char, start, end }));
        }
    }
    out
}

/// How many bytes of a reply were heard.
fn bytes_heard(reply: &str, text: &str) -> Result<usize, String> {
    if reply.starts_with(text) {
        return Ok(text.len());
    }
    let (said, mut heard) = (letters(reply), letters(text));
    if let Some(last) = heard.last()
        && last.char == ' '
        && said.get(heard.len() - 1).is_none_or(|letter| letter.char != ' ')
    {
        heard.pop();
    }
    let same = |&(at, letter): &(usize, &Letter)| said[at].char == letter.char;
    let same = heard.iter().enumerate().take(said.len()).take_while(same).count();
    let Some(last) = same.checked_sub(1).filter(|_| same == heard.len()).map(|last| said[last])
    else {
        if heard.is_empty() {
            return Ok(0);
        }
        return Err(difference(reply, text, said.get(same), heard.get(same)));
    };
    match said.get(same) {
        // An accent that the text lacks.
        Some(next) if next.start == last.start => {
            Err(difference(reply, text, Some(&last), heard.last()))
        }
        _ => Ok(last.end),
    }
}

fn difference(reply: &str, text: &str, said: Option<&Letter>, heard: Option<&Letter>) -> String {
    let excerpt = |text: &str, at: usize| {
        let rest = text.get(at..).unwrap_or_default();
        let short: String = rest.chars().take(EXCERPT).collect();
        let more = if short.len() < rest.len() { "..." } else { "" };
        format!("{short:?}{more}")
    };
    let at = heard.map_or(text.len(), |letter| letter.start);
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
        assert!(bytes_heard("One", "one").is_err() && bytes_heard("", "x").is_err());
    }
}
