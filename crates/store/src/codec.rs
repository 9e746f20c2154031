//! Lossless coding of a segment: zstd, plain or after the bytes of each element have been laid apart.

use std::io;

/// How a segment is coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// Not at all. Fastest; state hardly compresses.
    #[default]
    None,
    /// zstd at a level from 1 to 19, for segments that become at least 1/16 smaller by it. Elements of 2 and 4 bytes are
    /// first split into byte planes: all first bytes, then all second bytes, and so on.
    Zstd {
        /// The level.
        level: i32,
    },
}

/// How the bytes of one object are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Plain,
    Zstd,
    /// Byte planes of elements of so many bytes, then zstd.
    Planes(u8),
}

impl Encoding {
    pub(crate) const fn codes(self) -> (u8, u8) {
        match self {
            Self::Plain => (0, 0),
            Self::Zstd => (1, 0),
            Self::Planes(width) => (2, width),
        }
    }

    pub(crate) const fn from_codes(encoding: u8, width: u8) -> Option<Self> {
        match (encoding, width) {
            (0, 0) => Some(Self::Plain),
            (1, 0) => Some(Self::Zstd),
            (2, 2 | 4) => Some(Self::Planes(width)),
            _ => None,
        }
    }
}

/// Codes `plain`, whose elements have `width` bytes; `None` when it is not worth it.
pub(crate) fn encode(
    compression: Compression,
    width: u8,
    plain: &[u8],
) -> io::Result<Option<(Encoding, Vec<u8>)>> {
    let Compression::Zstd { level } = compression else { return Ok(None) };
    let planes = matches!(width, 2 | 4) && plain.len().is_multiple_of(width as usize);
    let (encoding, coded) = if planes {
        let split = split(plain, width as usize);
        (Encoding::Planes(width), zstd::bulk::compress(&split, level)?)
    } else {
        (Encoding::Zstd, zstd::bulk::compress(plain, level)?)
    };
    Ok((coded.len() <= plain.len() - plain.len() / 16).then_some((encoding, coded)))
}

/// Decodes into `plain`, all of which must be filled.
pub(crate) fn decode(encoding: Encoding, coded: &[u8], plain: &mut [u8]) -> Result<(), String> {
    let exactly = |got: usize, wanted: usize| {
        if got == wanted { Ok(()) } else { Err(format!("it gives {got} bytes, not {wanted}")) }
    };
    let unzip = |into: &mut [u8]| {
        let wanted = into.len();
        let got = zstd::bulk::decompress_to_buffer(coded, into).map_err(|e| e.to_string())?;
        exactly(got, wanted)
    };
    match encoding {
        Encoding::Plain => {
            exactly(coded.len(), plain.len())?;
            plain.copy_from_slice(coded);
            Ok(())
        }
        Encoding::Zstd => unzip(plain),
        Encoding::Planes(width) => {
            if !plain.len().is_multiple_of(width as usize) {
                return Err(format!("{} bytes are no elements of {width}", plain.len()));
            }
            let mut planes = vec![0; plain.len()];
            unzip(&mut planes)?;
            join(&planes, plain, width as usize);
            Ok(())
        }
    }
}

fn split(plain: &[u8], width: usize) -> Vec<u8> {
    let count = plain.len() / width;
    let mut planes = vec![0; plain.len()];
    for (byte, plane) in planes.chunks_exact_mut(count.max(1)).enumerate() {
        for (to, element) in plane.iter_mut().zip(plain.chunks_exact(width)) {
            *to = element[byte];
        }
    }
    planes
}

fn join(planes: &[u8], plain: &mut [u8], width: usize) {
    let count = plain.len() / width;
    for (byte, plane) in planes.chunks_exact(count.max(1)).enumerate() {
        for (from, element) in plane.iter().zip(plain.chunks_exact_mut(width)) {
            element[byte] = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZSTD: Compression = Compression::Zstd { level: 1 };

    #[test]
    fn every_coding_gives_the_bytes_back() {
        for width in [1_u8, 2, 4] {
            for length in [0, 4, 8, 4096, 100_000] {
                let plain: Vec<u8> = (0..length)
                    .map(|i| if i % 4 == 3 { 0x3f } else { (i * i / 7) as u8 })
                    .collect();
                let Some((encoding, coded)) = encode(ZSTD, width, &plain).unwrap() else {
                    assert!(length < 4096);
                    continue;
                };
                let mut back = vec![1; plain.len()];
                decode(encoding, &coded, &mut back).unwrap();
                assert_eq!(back, plain, "{width} {length}");
                assert!(decode(encoding, &coded, &mut back[..length - 4]).is_err());
                back.extend([0; 4]);
                assert!(decode(encoding, &coded, &mut back).is_err());
                assert!(decode(encoding, &coded[..coded.len() - 1], &mut back[..length]).is_err());
            }
        }
    }

    #[test]
    fn what_does_not_shrink_stays_plain() {
        let mut noise = vec![0; 10_000];
        getrandom::fill(&mut noise).unwrap();
        assert_eq!(encode(ZSTD, 4, &noise).unwrap(), None);
        assert_eq!(encode(Compression::None, 4, &[0; 10_000]).unwrap(), None);
        // An odd length has no planes.
        assert_eq!(encode(ZSTD, 4, &[0; 10_001]).unwrap().unwrap().0, Encoding::Zstd);
    }

    #[test]
    fn planes_pay_for_floats() {
        let floats: Vec<u8> =
            (0..50_000_u32).flat_map(|i| (1.0 + (i as f32).sin() / 3.0).to_le_bytes()).collect();
        let planes = encode(ZSTD, 4, &floats).unwrap().unwrap().1.len();
        assert!(planes < floats.len() * 9 / 10);
        assert!(zstd::bulk::compress(&floats, 1).unwrap().len() > planes);
    }
}
