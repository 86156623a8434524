// Draws openapi.json: each route with what it takes.

import { ask, trying } from "./api.js";
import { element } from "./grid.js";

// A field's type in a few words.
function typed(schema, parts) {
  if (schema.$ref) return shape(parts[schema.$ref.split("/").at(-1)], parts);
  if (schema.anyOf) return [...new Set(schema.anyOf.map((one) => typed(one, parts)))].join(" | ");
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.prefixItems) return `[${schema.prefixItems.map((one) => typed(one, parts)).join(", ")}]`;
  if (schema.type === "array") return `[${typed(schema.items, parts)}, …]`;
  return schema.description?.startsWith("data:") ? "data URL" : schema.type ?? "any";
}

function shape(schema, parts) {
  const fields = Object.entries(schema.properties ?? {}).map(([name, field]) =>
    `"${name}"${schema.required?.includes(name) ? "" : "?"}: ${typed(field, parts)}`);
  return `{${fields.join(", ")}}`;
}

await trying(async () => {
  const { paths, components } = await ask("/openapi.json");
  const parts = components?.schemas ?? {}, groups = new Map();
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const body = route.requestBody?.content["application/json"].schema;
      const given = (route.parameters ?? []).map((one) => `${one.name}: ${typed(one.schema, parts)}`).join(", ");
      const made = element("article", {},
        element("h3", {}, element("span", { className: "method" }, method.toUpperCase()), ` ${path}`),
        element("p", {}, route.summary), ...(given ? [element("p", {}, `With ${given}`)] : []),
        ...(body ? [element("pre", {}, typed(body, parts))] : []));
      groups.set(route.tags[0], [...(groups.get(route.tags[0]) ?? []), made]);
    }
  }
  for (const [title, articles] of groups) {
    document.getElementById("routes").append(element("h2", {}, title[0].toUpperCase() + title.slice(1)), ...articles);
  }
})();
